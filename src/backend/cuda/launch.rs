//! Which PTX file an entry is taken from.

use crate::error::{Error, Result};
pub(super) use crate::tensor::cuda::{Driver, Launch, MAP, Memory, Module, Parameter, TensorMap};

/// A kernel's PTX files: what is asked for is what the card can run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Files {
    /// For compute capability 7.5 and later, without bf16.
    turing: Option<Module>,
    /// For compute capability 8.0 and later.
    ampere: Module,
}

impl Files {
    pub(super) const fn new(turing: Option<Module>, ampere: Module) -> Files {
        Files { turing, ampere }
    }

    /// Runs `entry` of the best file for the card.
    pub(super) fn launch<'a>(
        &self,
        driver: &dyn Driver,
        entry: &str,
        launch: Launch,
        params: impl Into<Parameter<'a>>,
    ) -> Result<()> {
        let [major, minor] = driver.capability();
        let module = match &self.turing {
            _ if major >= 8 => &self.ampere,
            Some(module) if [major, minor] >= [7, 5] && !entry.ends_with("_bf16") => module,
            _ => return Err(Error::unsupported(format!("{entry} on a card of compute capability {major}.{minor}"))),
        };
        driver.launch(module, entry, launch, params.into())
    }

    /// The files that hold `entry`.
    pub(super) fn of(&self, entry: &str) -> Vec<Module> {
        let old = self.turing.filter(|_| !entry.ends_with("_bf16"));
        old.into_iter().chain([self.ampere]).collect()
    }
}

/// The files of a kernel: `files!("stem")`, or `files!("stem", bf16)` where only cards with bf16 have one.
macro_rules! files {
    ($stem:literal) => {
        $crate::backend::cuda::launch::Files::new(
            Some($crate::backend::cuda::launch::module!(concat!($stem, ".sm75.ptx"))),
            $crate::backend::cuda::launch::module!(concat!($stem, ".sm80.ptx")),
        )
    };
    ($stem:literal, bf16) => {
        $crate::backend::cuda::launch::Files::new(
            None,
            $crate::backend::cuda::launch::module!(concat!($stem, ".sm80.ptx")),
        )
    };
}
pub(super) use files;

/// The PTX file of this name as a [`Module`].
macro_rules! module {
    ($name:expr) => {
        $crate::tensor::cuda::Module { name: $name, packed: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".z")) }
    };
}
pub(super) use module;

/// Shared memory that every card of that capability gives a block.
pub(super) fn shared_limit(driver: &dyn Driver) -> usize {
    match driver.capability()[0] {
        0..=7 => 64 << 10,
        9 => 227 << 10,
        _ => 99 << 10,
    }
}
