//! A synthetic torso CT with its truth.
