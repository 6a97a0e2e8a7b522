//! Parallel loops whose results do not depend on the number of threads: work is cut into pieces by its own shape,
//! never by the thread count, and partial sums are combined in index order. They run in the *current* rayon pool.
//!
//! Loops hand rayon a reference to `dyn Fn`: a piece of work is long beside a call, and rayon's machinery is then
//! compiled once for each type of element instead of once for each loop of the library.

use rayon::prelude::*;

/// Calls `f(i)` for `0..n`, in any order.
pub(crate) fn for_each(n: usize, f: impl Fn(usize) + Sync + Send) {
    let f: &(dyn Fn(usize) + Sync) = &f;
    (0..n).into_par_iter().for_each(f);
}

/// As [`for_each`]; `f` is handed something to work with that `make` made, which it may find used.
pub(crate) fn for_each_with<S>(n: usize, make: impl Fn() -> S + Sync + Send, f: impl Fn(&mut S, usize) + Sync + Send) {
    let make: &(dyn Fn() -> S + Sync) = &make;
    let f: &(dyn Fn(&mut S, usize) + Sync) = &f;
    (0..n).into_par_iter().for_each_init(make, f);
}

/// Cuts `out` into pieces of `chunk` elements and calls `f(piece index, piece)`, in any order.
pub(crate) fn chunks_mut<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    // Closures carry the parameters of the function they stand in: one in here would be another for each loop.
    fn run<T: Send>(out: &mut [T], chunk: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        out.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(i, c)| f(i, c));
    }
    run(out, chunk, &f);
}

/// As [`chunks_mut`]; `f` is handed something to work with that `make` made, which it may find used.
pub(crate) fn chunks_mut_with<T: Send, S>(
    out: &mut [T],
    chunk: usize,
    make: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, usize, &mut [T]) + Sync + Send,
) {
    type Made<'a, S> = &'a (dyn Fn() -> S + Sync);
    type Piece<'a, T, S> = &'a (dyn Fn(&mut S, usize, &mut [T]) + Sync);
    fn run<T: Send, S>(out: &mut [T], chunk: usize, make: Made<S>, f: Piece<T, S>) {
        out.par_chunks_mut(chunk.max(1)).enumerate().for_each_init(make, |s, (i, c)| f(s, i, c));
    }
    run(out, chunk, &make, &f);
}

/// Both at once, where there is a thread for the second.
pub(crate) fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    rayon::join(a, b)
}

/// `f(i)` for `0..n`, collected in index order.
pub(crate) fn map<T: Send>(n: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    let f: &(dyn Fn(usize) -> T + Sync) = &f;
    (0..n).into_par_iter().map(f).collect()
}

/// Calls `f(index, item)` for all items, in any order.
pub(crate) fn each<T: Send>(items: Vec<T>, f: impl Fn(usize, T) + Sync + Send) {
    fn run<T: Send>(items: Vec<T>, f: &(dyn Fn(usize, T) + Sync)) {
        items.into_par_iter().enumerate().for_each(|(i, t)| f(i, t));
    }
    run(items, &f);
}
