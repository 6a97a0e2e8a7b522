//! Tolerances that follow from the reference instead of being chosen.

/// Unit roundoff of f32.
pub const U: f64 = 1.0 / (1 << 24) as f64;

/// Higham's gamma: the relative error bound of `k` roundings in a row (Accuracy and Stability of Numerical Algorithms,
/// section 3.1).
pub fn gamma(k: usize) -> f64 {
    let ku = k as f64 * U;
    ku / (1.0 - ku)
}

/// A reference value and the largest error that f32 arithmetic may leave in it.
#[derive(Debug, Clone, Copy)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

/// Panics at the first value outside its bound.
pub fn check(what: &str, got: &[f32], expected: &[Bounded]) {
    assert_eq!(got.len(), expected.len(), "{what}: number of values");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*g) - e.value).abs();
        // NaN is not less than anything and fails.
        assert!(error <= e.error, "{what}: [{i}] is {g}, expected {} within {}", e.value, e.error);
    }
}
