//! Work on many cases at once with a bound on how many are in memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::tensor::Device;

/// `f(i)` of the cases `0..n`, in index order, with the threads of `device`; at most that many cases are begun and not
/// finished. After an error or a wish to cancel no case is begun.
///
/// # Errors
/// The error of the first case that has one, [`Error::Cancelled`].
pub(crate) fn map<T: Send>(
    device: &Device,
    n: usize,
    progress: &mut dyn Progress,
    f: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    map_begun(device, n, progress, |_| Ok(()), |i, ()| f(i))
}

/// As [`map`]; `f` is handed what `begin` made of the case, which may wait, as it runs on none of the device's threads.
///
/// # Errors
/// As [`map`].
pub(crate) fn map_begun<B: Send, T: Send>(
    device: &Device,
    n: usize,
    progress: &mut dyn Progress,
    begin: impl Fn(usize) -> Result<B> + Sync,
    f: impl Fn(usize, B) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let told = Mutex::new((progress, 0));
    let slots: Vec<Mutex<Option<Result<T>>>> = (0..n).map(|_| Mutex::new(None)).collect();
    // A thread of the pool that waits inside of a case may take up another one, so the pool alone would set no bound.
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return;
            }
            // What went wrong while the case waited ends it.
            let begun = begin(i).and_then(|b| if stop.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(b) });
            let result = begun.and_then(|begun| device.install(|| f(i, begun))).and_then(|value| {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.1 += 1;
                let event = Event::Cases { done: told.1, total: n };
                tell(&mut *told.0, event).map(|()| value)
            });
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            *slots[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..device.threads().min(n) {
            scope.spawn(work);
        }
        work();
    });
    let mut out = Vec::with_capacity(n);
    let mut error = None;
    for slot in slots {
        match slot.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(Ok(value)) => out.push(value),
            // What is wrong tells more than that somebody did not want to wait for it.
            Some(Err(e)) if error.is_none() || matches!(error, Some(Error::Cancelled)) => error = Some(e),
            _ => {}
        }
    }
    error.map_or(Ok(out), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::progress::Flow;

    #[test]
    fn results_stand_in_order_and_the_first_error_wins() {
        let device = Device::cpu_with_threads(3).unwrap();
        let mut events = 0;
        let mut count = |_: Event<'_>| {
            events += 1;
            Flow::Continue
        };
        let squares = map(&device, 40, &mut count, |i| Ok(i * i)).unwrap();
        assert!(squares.iter().enumerate().all(|(i, s)| *s == i * i) && squares.len() == 40);
        assert_eq!(events, 40);
        let odd = map(&device, 9, &mut (), |i| if i < 2 { Ok(()) } else { Err(Error::usage(format!("case {i}"))) });
        assert_eq!(odd.unwrap_err().to_string(), "case 2");
        let mut cancel = |_: Event<'_>| Flow::Cancel;
        assert!(matches!(map(&device, 5, &mut cancel, Ok), Err(Error::Cancelled)));
        assert!(map(&device, 0, &mut cancel, Ok).unwrap().is_empty());
    }
}
