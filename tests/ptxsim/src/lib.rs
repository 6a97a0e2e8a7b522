//! Runs PTX, the very text that ships, on a machine with no GPU. For tests: exactness and hazards first, speed second.
//!
//! Beyond the result of a kernel, every launch finds: accesses outside of a buffer or of shared memory, misaligned ones,
//! reads of bytes that nothing wrote, warps of a block that race for shared memory, blocks of a grid that race for global
//! memory, missing proxy fences, instructions for whole warps that part of one reaches, deadlocks, integer divisions by zero,
//! atomics of floats, and wrong use of barriers. Asynchronous copies and wgmma complete as late as they may, so that a missing wait is an
//! error and not luck. [`Options::seed`] makes random schedules.
//!
//! It cannot find what only hardware has: speed, weak memory ordering, the order in which tensor cores add, bugs of the
//! assembler, how many registers it takes.
//!
//! ```
//! use ptxsim::{Machine, Module, Options, Params};
//!
//! let module = Module::parse(
//!     ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry fill(.param .u64 to)\n{\n.reg .b32 %r<2>;\n\
//!      .reg .b64 %rd<4>;\nld.param.u64 %rd1, [to];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\n\
//!      add.s64 %rd3, %rd1, %rd2;\nst.global.u32 [%rd3], %r1;\nret;\n}\n",
//! )?;
//! let mut gpu = Machine::new();
//! let to = gpu.alloc(4 * 32);
//! let params = Params::new().u64(to);
//! let report = gpu.launch(&module, "fill", [1, 1, 1], [32, 1, 1], 0, params.as_bytes(), &Options::default())?;
//! assert_eq!(gpu.unwritten(to)?, None);
//! assert_eq!(gpu.read(to, 8)?, [0, 0, 0, 0, 1, 0, 0, 0]);
//! assert!(report.uncovered().is_empty());
//! # Ok::<(), ptxsim::Error>(())
//! ```
#![forbid(unsafe_code)]

mod alu;
mod compare;
mod convert;
mod cta;
mod decode;
mod error;
mod exec;
mod float;
mod global;
mod ins;
mod machine;
mod parse;
mod report;
mod shared;
mod tensor_map;
mod text;
mod warp;

pub use error::{Error, Fault, Place, Result};
pub use float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use machine::{Machine, Options};
pub use parse::{Module, Param};
pub use report::{Params, Report, Site};
pub use tensor_map::{Im2col, Swizzle, TensorMap};
