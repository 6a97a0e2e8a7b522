//! Floor 5: parameters, modules, layers. Knows no concrete network.
