//! The 1x1x1 head applied to rows of voxels on the host, where class scores are aggregated and no
//! `[classes, D, H, W]` tensor may exist.

pub(crate) use crate::backend::cpu::head::{Activation, PackedHead, scores};
pub(crate) use crate::backend::cpu::head_argmax::{LinearHead, Tap, Winner, blend, head_row, label_row, sample};

use crate::tensor::Device;

/// For each voxel i: `sum[i] += scale[i] * activation(W x[i] + b)`; `x` is `[voxels][stride]`, `sum`
/// `[voxels][classes]`.
pub(crate) fn accumulate(
    device: &Device,
    head: &PackedHead,
    how: Activation,
    x: &[f32],
    scale: &[f32],
    sum: &mut [f32],
) {
    crate::backend::cpu::head::accumulate(device.isa(), head, how, x, scale, sum);
}
