//! Variants that count on what only a card can confirm are tried on every card before they are used.
//!
//! The trial is small problems with every kind of edge, solved by the variant and by one that every card runs. Their numbers
//! are small integers and halves, so that sums are exact in any order and results have to have the same bytes.

use super::super::launch::{Driver, Memory};
use super::super::{Norm, Source, Storage, padded};
use super::{OP, Plan, Problem, VARIANTS, Variant, entry, pack_weight, repeats, run};
use crate::error::{Error, Result};

/// What variants of stride 1 and 2 are held against, and the size of the result: bricks of the variants end beyond it, two of
/// them lie side by side, and along z there is one of either's, so that moments are of the same voxels. Even, so that it
/// can be that of voxels which are read twice.
const PROVED: [(&str, [usize; 3]); 2] = [("n64", [4, 10, 6]), ("any_n64", [2, 10, 6])];
const BATCH: usize = 2;
/// Channels of the two sources, of which the first is normalised: more slabs than there are buffers for bricks, and an odd
/// number of them, so that what a block does next begins in another buffer.
const CHANNELS: [usize; 2] = [32, 16];

/// Memory that is given back when it is no longer needed.
struct Held<'a> {
    driver: &'a dyn Driver,
    memory: Vec<Memory>,
}

impl Held<'_> {
    fn room(&mut self, bytes: usize) -> Result<Memory> {
        let memory = self.driver.alloc(bytes)?;
        self.memory.push(memory);
        Ok(memory)
    }

    fn with(&mut self, bytes: &[u8]) -> Result<Memory> {
        let memory = self.room(bytes.len())?;
        self.driver.upload(memory, bytes)?;
        Ok(memory)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for memory in self.memory.drain(..) {
            // Nobody can be told, and the context frees what is left.
            let _ = self.driver.free(memory);
        }
    }
}

/// Whether the card may use the variant for such a problem: known, or found out now.
///
/// # Errors
/// [`Error::OutOfMemory`]; [`Error::Device`] of a card that runs nothing, perhaps since the trial.
pub(super) fn passes(driver: &dyn Driver, v: &'static Variant, p: &Problem<'_>) -> Result<bool> {
    if !v.on_trial() {
        return Ok(true);
    }
    // What reads voxels twice is asked only of who does.
    let (name, repeats): (_, &[[usize; 3]]) = match repeats(p) {
        true => (format!("{} of voxels read twice", entry(v, p.storage)), &[[2; 3], [1, 2, 2]]),
        false => (entry(v, p.storage), &[[1; 3]]),
    };
    if let Some(passed) = driver.findings().passed(&name) {
        return Ok(passed);
    }
    let mut verdict = Ok(());
    for repeat in repeats {
        verdict = verdict.and(compare(driver, v, p.storage, *repeat)?);
    }
    if let Err(why) = &verdict {
        // After some faults of a kernel the driver runs no other: that is said of the one that did it.
        let unusable = |next| Error::Device { what: format!("{OP}: the trial of {name} ended in {why}, then {next}") };
        driver.synchronize().map_err(unusable)?;
    }
    let passed = verdict.is_ok();
    driver.findings().keep(&name, verdict);
    Ok(passed)
}

/// Integers from `-most` to `most`, the same for the same `seed`.
fn integers(n: usize, most: i32, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) % (2 * most as u32 + 1)) as f32 - most as f32
    };
    (0..n).map(|_| next()).collect()
}

/// Whether the variant solves the problem as it should, or what it does instead. Voxels of the first source are read
/// `repeat` times along each axis.
fn compare(
    driver: &dyn Driver,
    v: &'static Variant,
    storage: Storage,
    repeat: [usize; 3],
) -> Result<Result<(), String>> {
    let (name, out) = PROVED[v.stride() - 1];
    let Some(proved) = VARIANTS.iter().find(|v| v.name == name) else {
        return Err(Error::unsupported(format!("{OP} without {name}")));
    };
    let mut held = Held { driver, memory: Vec::new() };
    let voxels = BATCH * out.iter().product::<usize>();
    let read = out.map(|n| n * v.stride());
    // The last block of filters is not full.
    let filters = v.filters + padded(1);
    let mut sources = Vec::new();
    for (i, channels) in CHANNELS.into_iter().enumerate() {
        let repeat = if i == 0 { repeat } else { [1; 3] };
        let space = [0, 1, 2].map(|a| read[a] / repeat[a]);
        let values = storage.store(&integers(BATCH * space.iter().product::<usize>() * channels, 3, 1 + i as u32));
        sources.push(Source { repeat, ..Source::plain(held.with(&values)?, channels, space) });
    }
    let mut planes = integers(BATCH * 3 * CHANNELS[0], 1, 3);
    for (i, plane) in planes.iter_mut().enumerate() {
        // Scales of 1/2, 1 and 2.
        *plane = if i / CHANNELS[0] % 3 == 1 { plane.exp2() } else { *plane };
    }
    sources[0].norm = Some(Norm { planes: held.with(bytemuck::cast_slice(&planes))?, slope: 0.25 });
    let dims = [filters, CHANNELS.iter().sum(), 3, 3, 3];
    let weight = integers(dims.iter().product(), 2, 4);
    let mut p = Problem {
        storage,
        batch: BATCH,
        sources: &sources,
        weight: held.with(&pack_weight(&weight, dims, &CHANNELS, storage)?)?,
        bias: Some(held.with(bytemuck::cast_slice(&integers(filters, 3, 5)))?),
        filters,
        kernel: [3; 3],
        stride: [v.stride(); 3],
        out: Memory { address: 0, bytes: 0 },
        partials: None,
        workspace: None,
    };
    let mut solve = |v: &'static Variant| -> Result<(Vec<u8>, Vec<f32>)> {
        let tiles = v.tiles(out).iter().product::<usize>();
        p.out = held.room(voxels * filters * storage.bytes())?;
        let partials = held.room(BATCH * tiles * 3 * filters * 4)?;
        p.partials = Some(partials);
        // No number, so that what nothing writes is seen.
        driver.memset(p.out, 0xff)?;
        driver.memset(partials, 0xff)?;
        run(driver, &p, &Plan { variant: v, parts: 1, tiles, workspace: 0, staying: 1 })?;
        let (mut out, mut moments) = (vec![0; p.out.bytes], vec![0f32; partials.bytes / 4]);
        driver.download(p.out, &mut out)?;
        driver.download(partials, bytemuck::cast_slice_mut(&mut moments))?;
        Ok((out, moments))
    };
    let (expected, moments) = solve(proved)?;
    let (own, own_moments) = match solve(v) {
        Err(e @ Error::OutOfMemory { .. }) => return Err(e),
        Err(e) => return Ok(Err(e.to_string())),
        Ok(own) => own,
    };
    if own != expected {
        return Ok(Err(format!("a trial gave other values than {name}")));
    }
    let near = moments.chunks_exact(3 * filters).zip(own_moments.chunks_exact(3 * filters)).all(|(a, b)| {
        let of = |m: &[f32], i: usize| [0, 1, 2].map(|k| f64::from(m[k * filters + i]));
        (0..filters).all(|i| same_moments(of(a, i), of(b, i)))
    });
    Ok(if moments.len() == own_moments.len() && near {
        Ok(())
    } else {
        Err(format!("a trial gave other moments than {name}"))
    })
}

/// Whether count, mean and squares of a tile are of the same values, summed in another order: each sum of n values is off by at
/// most n roundings of the sum of absolute values, which is no more than n times their root mean square.
fn same_moments(a: [f64; 3], b: [f64; 3]) -> bool {
    let rounding = 2.0 * (a[0] + 4.0) * f64::from(f32::EPSILON);
    let size = a[1].abs() + (a[2] / a[0]).sqrt();
    a[0] == b[0] && (a[1] - b[1]).abs() <= rounding * size && (a[2] - b[2]).abs() <= rounding * a[2]
}
