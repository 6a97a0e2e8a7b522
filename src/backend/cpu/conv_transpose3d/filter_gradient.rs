//! The way back to the filter: for every input channel, tap and output channel the sum of products of the input and the
//! output's gradient over all voxels.
//!
//! Voxels come in chunks whose sums are made in registers; chunks are added up in slices, and slices in order, so that
//! the number of threads changes nothing and no long row of additions loses digits.

use super::{Geometry, Gradient};
use crate::backend::cpu::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// Voxels of a chunk: one block of the input and one pair of taps of them fit a level-1 cache, with all taps a level-2
/// cache.
const CHUNK: usize = 128;

/// Pieces of work to have at least, where there are enough chunks.
const ITEMS: usize = 128;

/// Chunks of all samples; slices that they are added up in.
fn cut(g: &Geometry) -> (usize, usize) {
    let chunks = g.batch * g.voxels().div_ceil(CHUNK);
    (chunks, chunks.min(ITEMS.div_ceil(g.blocks())))
}

/// Floats of one output block of the packed filter.
fn panel(g: &Geometry) -> usize {
    g.taps() * g.in_channels * BLOCK
}

/// Floats of all slices' sums; none for a single one.
pub(super) fn room(g: &Geometry) -> usize {
    match cut(g).1 {
        1 => 0,
        slices => slices * g.blocks() * panel(g),
    }
}

/// Writes the gradient by the packed filter to `out`.
pub(super) fn run(isa: Isa, p: &Gradient<'_>, room: &mut [f32], out: &mut [f32]) {
    let g = &p.geometry;
    if cut(g).1 == 1 {
        return slices(isa, p, out);
    }
    let room = &mut room[..self::room(g)];
    slices(isa, p, room);
    let (room, len) = (&*room, out.len());
    par::chunks_mut(out, panel(g), |block, out| {
        let first = block * panel(g);
        out.copy_from_slice(&room[first..][..panel(g)]);
        for part in room.chunks_exact(len).skip(1) {
            out.iter_mut().zip(&part[first..]).for_each(|(o, v)| *o += v);
        }
    });
}

/// Writes the sum of each slice.
fn slices(isa: Isa, p: &Gradient<'_>, out: &mut [f32]) {
    let g = &p.geometry;
    let ((chunks, slices), per_sample) = (cut(g), g.voxels().div_ceil(CHUNK));
    par::chunks_mut_with(out, panel(g), Vec::new, |taps: &mut Vec<f32>, i, out| {
        let (slice, block) = (i / g.blocks(), i % g.blocks());
        out.fill(0.0);
        for i in slice * chunks / slices..(slice + 1) * chunks / slices {
            let (n, first) = (i / per_sample, i % per_sample * CHUNK);
            let voxels = CHUNK.min(g.voxels() - first);
            taps.resize(g.taps() * voxels * BLOCK, 0.0);
            for (tap, to) in taps.chunks_exact_mut(voxels * BLOCK).enumerate() {
                g.gather(&p.output[(n * g.blocks() + block) * g.out_voxels() * BLOCK..], tap, first, to);
            }
            let input = &p.input[n * g.in_blocks() * g.voxels() * BLOCK..];
            add_chunk::on(isa, &Chunk { geometry: g, input, first, voxels, taps }, out);
        }
    });
}

/// Some voxels of a sample, and what an output block has where each tap puts them: `[tap][voxel][16]`.
struct Chunk<'a> {
    geometry: &'a Geometry,
    input: &'a [f32],
    first: usize,
    voxels: usize,
    taps: &'a [f32],
}

simd_entry!(add_chunk = chunk_of(c: &Chunk<'_>, out: &mut [f32]));

#[inline(always)]
fn chunk_of<S: Simd>(s: S, c: &Chunk<'_>, out: &mut [f32]) {
    match c.geometry.pair() {
        2 => panels::<S, 2>(s, c, out),
        _ => panels::<S, 1>(s, c, out),
    }
}

/// `T` taps together, which are the innermost of the packed filter.
#[inline(always)]
fn panels<S: Simd, const T: usize>(s: S, c: &Chunk<'_>, out: &mut [f32]) {
    let channels = c.geometry.in_channels;
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let (taps, _) = c.taps.as_chunks::<BLOCK>();
    let (input, _) = c.input.as_chunks::<BLOCK>();
    // A block is one register or several, of as many as fit beside operands.
    let wide = size_of::<S::V>() == 64 && align_of::<S::V>() == 64;
    for (pair, out) in out.chunks_exact_mut(channels * T).enumerate() {
        let mut dy = [&taps[..0]; T];
        for k in 0..T {
            dy[k] = &taps[(pair * T + k) * c.voxels..][..c.voxels];
        }
        for (block, out) in out.chunks_mut(BLOCK * T).enumerate() {
            let x = &input[block * c.geometry.voxels() + c.first..][..c.voxels];
            let (lanes, mut lane) = (out.len() / T, 0);
            while wide && lanes - lane >= 8 {
                tile::<S, 8, T>(s, x, lane, &dy, &mut out[lane * T..]);
                lane += 8;
            }
            while lanes - lane >= 4 {
                // Two taps of two registers each leave room for the sums of two channels.
                if wide || T == 1 {
                    tile::<S, 4, T>(s, x, lane, &dy, &mut out[lane * T..]);
                } else {
                    tile::<S, 2, T>(s, x, lane, &dy, &mut out[lane * T..]);
                    tile::<S, 2, T>(s, x, lane + 2, &dy, &mut out[(lane + 2) * T..]);
                }
                lane += 4;
            }
            while lane < lanes {
                tile::<S, 1, T>(s, x, lane, &dy, &mut out[lane * T..]);
                lane += 1;
            }
        }
    }
}

/// Adds the products of `R` input channels from `lane` on and `T` taps to `out`, `[R][T]`.
#[inline(always)]
fn tile<S: Simd, const R: usize, const T: usize>(
    s: S,
    x: &[[f32; BLOCK]],
    lane: usize,
    dy: &[&[[f32; BLOCK]]; T],
    out: &mut [[f32; BLOCK]],
) {
    let zero = s.splat(0.0);
    let mut sums = [[zero; T]; R];
    for (v, x) in x.iter().enumerate() {
        let mut d = [zero; T];
        for k in 0..T {
            d[k] = s.load(&dy[k][v]);
        }
        let x = &x[lane..lane + R];
        for r in 0..R {
            let x = s.splat(x[r]);
            for k in 0..T {
                sums[r][k] = s.fma(x, d[k], sums[r][k]);
            }
        }
    }
    for r in 0..R {
        for k in 0..T {
            let to = &mut out[r * T + k];
            s.store(s.add(s.load(to), sums[r][k]), to);
        }
    }
}

/// The definition, one value at a time.
pub(super) fn reference(_: Isa, p: &Gradient<'_>, _: &mut [f32], out: &mut [f32]) {
    let g = &p.geometry;
    par::chunks_mut(out, panel(g), |block, out| {
        out.fill(0.0);
        for tap in 0..g.taps() {
            let (start, channel) = g.weights(0, tap);
            for n in 0..g.batch {
                let dy = &p.output[(n * g.blocks() + block) * g.out_voxels() * BLOCK..];
                for v in 0..g.voxels() {
                    let Some(at) = g.target(v, tap) else { continue };
                    for c in 0..g.in_channels {
                        let x = p.input[((n * g.in_blocks() + c / BLOCK) * g.voxels() + v) * BLOCK + c % BLOCK];
                        let to = &mut out[start + c * channel..][..BLOCK];
                        to.iter_mut().zip(&dy[at..]).for_each(|(o, d)| *o += x * d);
                    }
                }
            }
        }
    });
}
