//! Packing of filters, and back.

use crate::base::par;
use crate::tensor::{BLOCK, Isa, Stored, StoredMut, narrowed};

/// Packs `values` in `[O, I, kD, kH, kW]` order into `out` of [`super::packed_len`] values. Lanes past O become zero.
pub(crate) fn pack_filter(_: Isa, values: &[f32], dims: [usize; 5], out: StoredMut<'_>) {
    match out {
        StoredMut::F32(out) => pack(values, dims, out, |v| v),
        StoredMut::Bf16(out) => pack(values, dims, out, narrowed),
    }
}

fn pack<T: Copy + Default + Send>(
    values: &[f32],
    [o, i, kd, kh, kw]: [usize; 5],
    out: &mut [T],
    stored: impl Fn(f32) -> T + Sync + Send,
) {
    let taps = kd * kh * kw;
    par::chunks_mut(out, 2 * BLOCK * i * taps, |group, out| {
        let width = out.len() / (i * taps).max(1);
        out.fill(T::default());
        let first = group * 2 * BLOCK;
        for c in 0..i {
            for lane in 0..width.min(o - first) {
                let from = &values[((first + lane) * i + c) * taps..][..taps];
                for (t, v) in from.iter().enumerate() {
                    out[(t * i + c) * width + lane] = stored(*v);
                }
            }
        }
    });
}

/// Writes a filter packed by [`pack_filter`] to `out` in `[O, I, kD, kH, kW]` order.
pub(crate) fn unpack_filter(_: Isa, packed: Stored<'_>, [o, i, kd, kh, kw]: [usize; 5], out: &mut [f32]) {
    let taps = kd * kh * kw;
    let lanes = o.next_multiple_of(BLOCK);
    par::chunks_mut(out, i * taps, |row, out| {
        let group = row / (2 * BLOCK) * 2 * BLOCK;
        let width = (lanes - group).min(2 * BLOCK);
        let start = group * i * taps + row - group;
        for (c, out) in out.chunks_exact_mut(taps).enumerate() {
            for (t, v) in out.iter_mut().enumerate() {
                *v = packed.get(start + (t * i + c) * width);
            }
        }
    });
}
