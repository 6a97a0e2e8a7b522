//! Parallel loops whose results do not depend on the number of threads: work is cut into pieces by its own shape,
//! never by the thread count, and partial sums are combined in index order. They run in the *current* rayon pool.

use rayon::prelude::*;

/// Calls `f(i)` for `0..n`, in any order.
pub(crate) fn for_each(n: usize, f: impl Fn(usize) + Sync + Send) {
    (0..n).into_par_iter().for_each(f);
}

/// Cuts `out` into pieces of `chunk` elements and calls `f(piece index, piece)`, in any order.
pub(crate) fn chunks_mut<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    out.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(i, c)| f(i, c));
}

/// `f(i)` for `0..n`, collected in index order.
pub(crate) fn map<T: Send>(n: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    (0..n).into_par_iter().map(f).collect()
}

/// Sum of `f(i)` over `0..n` in index order, whatever the threads.
#[cfg_attr(not(test), allow(dead_code, reason = "the reduction of later floors; its order is the contract"))]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f64 + Sync + Send) -> f64 {
    map(n, f).into_iter().sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sum_is_the_same_for_any_thread_count() {
        let f = |i: usize| 1.0 / (i as f64 + 0.3);
        let sums: Vec<u64> = [1, 2, 7]
            .map(|t| rayon::ThreadPoolBuilder::new().num_threads(t).build().unwrap().install(|| super::sum(10_000, f)))
            .map(f64::to_bits)
            .to_vec();
        assert!(sums.windows(2).all(|w| w[0] == w[1]));
    }
}
