//! Affine maps of a grid: images are interpolated linearly, labels are those with the largest interpolated share.

use super::isa::{Simd, simd_entry};
use crate::tensor::{BLOCK, Isa};

/// Where the voxels of a grid lie in a source, which is a box that was cut out of a larger volume.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Warp {
    /// Voxel `t` of the grid lies at `matrix t + shift` in the box, both as (z, y, x).
    pub(crate) matrix: [[f64; 3]; 3],
    pub(crate) shift: [f64; 3],
    /// Voxels of the box along (z, y, x), at least two along every axis that is interpolated. What lies outside takes the
    /// value at the nearest place of the box.
    pub(crate) source: [usize; 3],
    /// Voxels of the grid.
    pub(crate) grid: [usize; 3],
    /// Where the box begins in the volume: a place halfway between two voxels is nearer to the even one.
    pub(crate) origin: [i64; 3],
    /// Interpolate in planes: plane z of the grid is plane z of the box.
    pub(crate) planes: bool,
}

/// `image` and `labels` hold whole boxes, one per channel; as many grids are written.
pub(crate) fn warp(isa: Isa, how: &Warp, image: &[f32], labels: &[i16], image_out: &mut [f32], labels_out: &mut [i16]) {
    if how.grid.contains(&0) {
        return;
    }
    let volume = how.source.iter().product::<usize>();
    let fits =
        |n: usize, out: usize| n * how.grid.iter().product::<usize>() == out * volume && n.is_multiple_of(volume);
    let interpolated = if how.planes { 1 } else { 0 };
    assert!(
        how.source[interpolated..].iter().all(|n| (2..1 << 24).contains(n))
            && i32::try_from(volume).is_ok()
            && (!how.planes || how.source[0] >= how.grid[0])
            && fits(image.len(), image_out.len())
            && fits(labels.len(), labels_out.len()),
        "warp of a box {:?} to a grid {:?}",
        how.source,
        how.grid
    );
    if how.planes {
        planes::on(isa, how, image, labels, image_out, labels_out);
    } else {
        volumes::on(isa, how, image, labels, image_out, labels_out);
    }
}

/// Voxels of a tile of the grid along each axis.
const TILE: usize = 32;

simd_entry!(planes = warp_planes(how: &Warp, image: &[f32], labels: &[i16], image_out: &mut [f32], labels_out: &mut [i16]));
simd_entry!(volumes = warp_volumes(how: &Warp, image: &[f32], labels: &[i16], image_out: &mut [f32], labels_out: &mut [i16]));

#[inline(always)]
fn warp_planes<S: Simd>(s: S, how: &Warp, image: &[f32], labels: &[i16], io: &mut [f32], lo: &mut [i16]) {
    rows::<S, 4>(s, how, image, labels, io, lo);
}

#[inline(always)]
fn warp_volumes<S: Simd>(s: S, how: &Warp, image: &[f32], labels: &[i16], io: &mut [f32], lo: &mut [i16]) {
    rows::<S, 8>(s, how, image, labels, io, lo);
}

/// Where sixteen voxels of a row of the grid lie.
struct Places {
    /// Offset of the corner before each.
    corner: [i32; BLOCK],
    /// Shares of the corners after it along z, y and x.
    share: [[f32; BLOCK]; 3],
    /// Voxel of the corner before along z, y and x.
    voxel: [[i32; BLOCK]; 3],
}

/// `CORNERS` is 8, or 4 in planes.
#[inline(always)]
fn rows<S: Simd, const CORNERS: usize>(
    s: S,
    how: &Warp,
    image: &[f32],
    labels: &[i16],
    image_out: &mut [f32],
    labels_out: &mut [i16],
) {
    let ([d, h, w], [gd, gh, gw]) = (how.source, how.grid);
    let (volume, grid) = (d * h * w, gd * gh * gw);
    let first = if CORNERS == 4 { 1 } else { 0 };
    // Corners are pairs along x.
    let pairs = [0, w, h * w, h * w + w];
    // Tiles: what they read stays in the level-2 cache however the source lies.
    let tiles = [gd.div_ceil(TILE), gh.div_ceil(TILE), gw.div_ceil(TILE)];
    for tile in 0..tiles[0] * tiles[1] * tiles[2] {
        let at = [tile / (tiles[1] * tiles[2]), tile / tiles[2] % tiles[1], tile % tiles[2]].map(|i| i * TILE);
        for z in at[0]..gd.min(at[0] + TILE) {
            for y in at[1]..gh.min(at[1] + TILE) {
                let mut begin = [0.0f32; 3];
                for k in first..3 {
                    begin[k] = (how.shift[k] + how.matrix[k][0] * z as f64 + how.matrix[k][1] * y as f64) as f32;
                }
                let row = (z * gh + y) * gw;
                for x in (at[2]..gw.min(at[2] + TILE)).step_by(BLOCK) {
                    let n = BLOCK.min(gw - x);
                    let p = places::<CORNERS>(how, begin, z, x);
                    for c in 0..image.len() / volume {
                        let from = &image[c * volume..][..volume];
                        let v = interpolated::<S, CORNERS>(s, from, pairs, &p);
                        image_out[c * grid + row + x..][..n].copy_from_slice(&v[..n]);
                    }
                    for c in 0..labels.len() / volume {
                        let from = &labels[c * volume..][..volume];
                        let to = &mut labels_out[c * grid + row + x..][..n];
                        winners::<CORNERS>(how, from, pairs, &p, to);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn places<const CORNERS: usize>(how: &Warp, begin: [f32; 3], z: usize, x: usize) -> Places {
    let mut p = Places { corner: [0; BLOCK], share: [[0.0; BLOCK]; 3], voxel: [[0; BLOCK]; 3] };
    let first = if CORNERS == 4 { 1 } else { 0 };
    if CORNERS == 4 {
        p.corner = [(z * how.source[1] * how.source[2]) as i32; BLOCK];
    }
    for k in first..3 {
        let step = how.matrix[k][2] as f32;
        let last = (how.source[k] - 1) as f32;
        let before = how.source[k] as i32 - 2;
        let stride = [how.source[1] * how.source[2], how.source[2], 1][k] as i32;
        for l in 0..BLOCK {
            let at = begin[k] + step * (x + l) as f32;
            // In this order also NaN ends up inside.
            let at = if at > 0.0 { at } else { 0.0 };
            let at = if at < last { at } else { last };
            // SAFETY: 0 <= at <= source - 1 < 2^24.
            let whole: i32 = unsafe { at.to_int_unchecked() };
            let i = if whole < before { whole } else { before };
            p.voxel[k][l] = i;
            p.share[k][l] = at - i as f32;
            p.corner[l] += i * stride;
        }
    }
    p
}

#[inline(always)]
fn interpolated<S: Simd, const CORNERS: usize>(s: S, from: &[f32], pairs: [usize; 4], p: &Places) -> [f32; BLOCK] {
    let mut v = [[0.0f32; BLOCK]; CORNERS];
    for l in 0..BLOCK {
        let at = p.corner[l] as usize;
        for pair in 0..CORNERS / 2 {
            let here = at + pairs[pair];
            debug_assert!(here + 1 < from.len());
            // SAFETY: a corner before has at least one voxel after it along every interpolated axis of the box, see
            // `places`, and `from` is a whole box.
            unsafe {
                v[2 * pair][l] = *from.get_unchecked(here);
                v[2 * pair + 1][l] = *from.get_unchecked(here + 1);
            }
        }
    }
    let [fz, fy, fx] = [s.load(&p.share[0]), s.load(&p.share[1]), s.load(&p.share[2])];
    let mut planes = [s.splat(0.0); 2];
    for z in 0..CORNERS / 4 {
        let mut rows = [s.splat(0.0); 2];
        for y in 0..2 {
            let (a, b) = (s.load(&v[4 * z + 2 * y]), s.load(&v[4 * z + 2 * y + 1]));
            rows[y] = s.fma(fx, s.sub(b, a), a);
        }
        planes[z] = s.fma(fy, s.sub(rows[1], rows[0]), rows[0]);
    }
    let mut out = [0.0; BLOCK];
    s.store(if CORNERS == 8 { s.fma(fz, s.sub(planes[1], planes[0]), planes[0]) } else { planes[0] }, &mut out);
    out
}

#[inline(always)]
fn winners<const CORNERS: usize>(how: &Warp, from: &[i16], pairs: [usize; 4], p: &Places, to: &mut [i16]) {
    for (l, to) in to.iter_mut().enumerate() {
        let at = p.corner[l] as usize;
        let mut two = [0u32; 4];
        for pair in 0..CORNERS / 2 {
            let here = at + pairs[pair];
            debug_assert!(here + 1 < from.len());
            // SAFETY: as in `interpolated`: both labels are there, and a read may be unaligned.
            two[pair] = unsafe { from.as_ptr().add(here).cast::<u32>().read_unaligned() };
        }
        let mut different = two[0] ^ two[0].rotate_left(16);
        for pair in 1..CORNERS / 2 {
            different |= two[0] ^ two[pair];
        }
        let labels: [[i16; 2]; 4] = bytemuck::cast(two);
        *to = if different == 0 { labels[0][0] } else { winner::<CORNERS>(how, labels.as_flattened(), p, l) };
    }
}

/// The label with the largest share, shares rounded as nnU-Net rounds them: thousandths in half precision. Where several
/// have it, the label of the nearest voxel if it is one of them, else the smallest.
#[inline(always)]
fn winner<const CORNERS: usize>(how: &Warp, labels: &[i16], p: &Places, l: usize) -> i16 {
    let share = [if CORNERS == 8 { p.share[0][l] } else { 0.0 }, p.share[1][l], p.share[2][l]];
    let mut weight = [0.0f32; 8];
    for c in 0..CORNERS {
        let along = |k: usize, after: bool| if after { share[k] } else { 1.0 - share[k] };
        weight[c] = along(0, c & 4 != 0) * (along(1, c & 2 != 0) * along(2, c & 1 != 0));
    }
    let score = |label: i16| {
        let mut sum = 0.0;
        for c in 0..CORNERS {
            sum += if labels[c] == label { 1000.0 * weight[c] } else { 0.0 };
        }
        half_precision(sum)
    };
    let (mut best, mut most) = (labels[0], score(labels[0]));
    let mut tied = false;
    for c in 1..CORNERS {
        let label = labels[c];
        if labels[..c].contains(&label) {
            continue;
        }
        let score = score(label);
        if score > most {
            (best, most, tied) = (label, score, false);
        } else if score == most {
            (best, tied) = (best.min(label), true);
        }
    }
    if !tied {
        return best;
    }
    let nearest = (0..3).fold(0, |c, k| {
        let odd = (i64::from(p.voxel[k][l]) + how.origin[k]) & 1 == 1;
        let after = share[k] > 0.5 || (share[k] == 0.5 && odd);
        if after && (k > 0 || CORNERS == 8) { c | 4 >> k } else { c }
    });
    if score(labels[nearest]) == most { labels[nearest] } else { best }
}

/// Rounded to the eleven bits of a half-precision number, ties to even.
fn half_precision(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff)
}
