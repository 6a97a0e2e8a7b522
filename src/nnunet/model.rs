//! Model folders: nnU-Net v1, nnU-Net v2 and the project's own.
