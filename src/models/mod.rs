//! Floor 6: the networks. Knows no files, plans or patches.
