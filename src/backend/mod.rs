//! Floor 2: arithmetic on buffers. No gradients, no shape rules, no policy.
//!
//! An operation has an ordered list of implementations per backend, fastest first and the plain reference last. The
//! first one that the device can run and that supports the problem is taken; tests and benchmarks walk the whole list.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod testing;

use crate::tensor::Isa;

/// Calls `op::function(isa, arguments ..)` of the backend that `$device` belongs to, with the device's own threads as
/// the current pool. Operations on a card have left before, see `ops::cuda`.
macro_rules! dispatch {
    ($device:expr, $op:ident :: $function:ident ( $($argument:expr),* $(,)? )) => {{
        let device: &$crate::tensor::Device = $device;
        match device {
            $crate::tensor::Device::Cpu(_) => {
                let isa = device.isa();
                device.install(|| $crate::backend::cpu::$op::$function(isa, $($argument),*))
            }
            #[cfg(feature = "cuda")]
            $crate::tensor::Device::Cuda(_) => unreachable!("a card's operations begin in ops::cuda"),
        }
    }};
}
pub(crate) use dispatch;

/// As [`dispatch!`], of what takes no memory and leaves none: a device that only rehearses computes nothing, and `$nothing`
/// stands for the result.
macro_rules! compute {
    ($device:expr, $op:ident :: $function:ident ( $($argument:expr),* $(,)? ), $nothing:expr) => {{
        let device: &$crate::tensor::Device = $device;
        if device.is_rehearsal() {
            $nothing
        } else {
            $crate::backend::dispatch!(device, $op::$function($($argument),*))
        }
    }};
}
pub(crate) use compute;

/// One implementation of an operation: `P` is the problem it may or may not support, `F` the function that solves it.
pub(crate) struct Impl<P, F> {
    /// Unique within the operation's list.
    pub(crate) name: &'static str,
    /// What the processor must have.
    pub(crate) isa: Isa,
    /// Whether this implementation can solve the problem, given the instruction set.
    pub(crate) supports: fn(&P) -> bool,
    /// Solves it.
    pub(crate) run: F,
}

impl<P, F> Impl<P, F> {
    /// Whether a processor used at level `isa` can solve `problem` with this implementation.
    pub(crate) fn fits(&self, isa: Isa, problem: &P) -> bool {
        self.isa <= isa && (self.supports)(problem)
    }
}

/// The first implementation that fits, or with `name` the first of that name that fits.
pub(crate) fn pick<'l, P, F>(
    list: &'l [Impl<P, F>],
    isa: Isa,
    problem: &P,
    name: Option<&str>,
) -> Option<&'l Impl<P, F>> {
    list.iter().find(|i| i.fits(isa, problem) && name.is_none_or(|n| n == i.name))
}

/// The names of all implementations that fit, in order.
pub(crate) fn names<P, F>(list: &[Impl<P, F>], isa: Isa, problem: &P) -> Vec<&'static str> {
    list.iter().filter(|i| i.fits(isa, problem)).map(|i| i.name).collect()
}

/// The list of an operation whose implementations are one algorithm compiled per instruction set: `run` is told which.
pub(crate) const fn levels<P, F: Copy>(run: F) -> [Impl<P, F>; 3] {
    const fn any<P>(_: &P) -> bool {
        true
    }
    [
        Impl { name: "avx512", isa: Isa::Avx512, supports: any, run },
        Impl { name: "avx2", isa: Isa::Avx2, supports: any, run },
        Impl { name: "scalar", isa: Isa::Scalar, supports: any, run },
    ]
}

/// The error of asking by name for an implementation that does not fit; without a name the reference always does.
pub(crate) fn no_implementation(op: &'static str, name: Option<&str>) -> crate::Error {
    crate::Error::unsupported(format!("{op} has no implementation {} for this problem", name.unwrap_or("at all")))
}
