//! Solids as signed distances (mm, negative inside) and smooth random fields: what the phantom is made of.

use crate::base::rng::{Rng, philox4x32};

/// A point or vector (x, y, z) in mm.
pub(super) type Vec3 = [f64; 3];

/// A rotation about x, then y, then z, as three rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotation([Vec3; 3]);

impl Rotation {
    /// Angles in degrees.
    pub(super) fn degrees(x: f64, y: f64, z: f64) -> Self {
        let [(sx, cx), (sy, cy), (sz, cz)] = [x, y, z].map(|a| a.to_radians().sin_cos());
        Self([
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ])
    }

    /// The inverse rotation of `v`.
    pub(super) fn undo(&self, v: Vec3) -> Vec3 {
        let [a, b, c] = self.0;
        [0, 1, 2].map(|i| a[i] * v[0] + b[i] * v[1] + c[i] * v[2])
    }
}

/// A rotated ellipsoid.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ellipsoid {
    pub(super) centre: Vec3,
    pub(super) radii: Vec3,
    pub(super) rotation: Rotation,
}

impl Ellipsoid {
    /// First-order signed distance: exact on the surface, where alone it matters.
    pub(super) fn distance(&self, p: Vec3) -> f64 {
        let v = self.rotation.undo([0, 1, 2].map(|i| p[i] - self.centre[i]));
        let q = [0, 1, 2].map(|i| v[i] / self.radii[i]);
        let gradient = [0, 1, 2].map(|i| q[i] / self.radii[i]);
        let (f, g) = (length(q), length(gradient));
        // At the very centre the gradient vanishes and the smallest radius is the distance.
        if g < 1e-9 { -self.radii.into_iter().fold(f64::INFINITY, f64::min) } else { f * (f - 1.0) / g }
    }
}

/// Signed distance to an upright elliptic cylinder around the origin of the plane.
pub(super) fn elliptic_cylinder(x: f64, y: f64, rx: f64, ry: f64) -> f64 {
    let (qx, qy) = (x / rx, y / ry);
    let (f, g) = (qx.hypot(qy), (qx / rx).hypot(qy / ry));
    if g < 1e-9 { -rx.min(ry) } else { f * (f - 1.0) / g }
}

/// Radial signed distance to a superellipse of exponent 2.5, the outline of a trunk: flatter than an ellipse in front
/// and at the back, rounder than a box.
pub(super) fn superellipse(x: f64, y: f64, rx: f64, ry: f64) -> f64 {
    let power = |t: f64| t * t * t.sqrt();
    let f = (power((x / rx).abs()) + power((y / ry).abs())).powf(0.4);
    if f < 1e-9 { -rx.min(ry) } else { x.hypot(y) * (1.0 - 1.0 / f) }
}

/// Euclidean length.
pub(super) fn length(v: Vec3) -> f64 {
    (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]).sqrt()
}

/// Union of two distances with a fillet of width `k` mm (the polynomial smooth minimum).
pub(super) fn smooth_union(a: f64, b: f64, k: f64) -> f64 {
    let h = (k - (a - b).abs()).max(0.0) / k;
    a.min(b) - h * h * k * 0.25
}

/// 0 below `lo`, 1 above `hi`, a smooth cubic step between; `lo > hi` steps down.
pub(super) fn smoothstep(lo: f64, hi: f64, x: f64) -> f64 {
    let t = ((x - lo) / (hi - lo)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Value noise: independent normal numbers on a lattice, interpolated smoothly.
#[derive(Debug, Clone)]
pub(super) struct Noise {
    values: Vec<f32>,
    step: f64,
}

impl Noise {
    /// Nodes per axis; the field repeats after `NODES * step` mm.
    const NODES: usize = 32;

    /// A field whose grains are about `step` mm wide, standard deviation near 0.6.
    pub(super) fn new(seed: u64, stream: u64, step: f64) -> Self {
        let mut rng = Rng::new(seed, stream);
        let values = (0..Self::NODES.pow(3)).map(|_| rng.normal() as f32).collect();
        Self { values, step }
    }

    /// The field at `p`.
    pub(super) fn at(&self, p: Vec3) -> f64 {
        let mut node = [[0usize; 2]; 3];
        let mut weight = [0.0; 3];
        for i in 0..3 {
            let t = p[i] / self.step;
            let low = t.floor();
            let n = (low as i64).rem_euclid(Self::NODES as i64) as usize;
            node[i] = [n, (n + 1) % Self::NODES];
            weight[i] = smoothstep(0.0, 1.0, t - low);
        }
        let value = |z: usize, y: usize, x: usize| {
            f64::from(self.values[(node[2][z] * Self::NODES + node[1][y]) * Self::NODES + node[0][x]])
        };
        let mix = |a: f64, b: f64, t: f64| a + (b - a) * t;
        let row = |z: usize, y: usize| mix(value(z, y, 0), value(z, y, 1), weight[0]);
        let plane = |z: usize| mix(row(z, 0), row(z, 1), weight[1]);
        mix(plane(0), plane(1), weight[2])
    }
}

/// Adds white Gaussian noise of standard deviation `sd` to a slice of voxels that starts at voxel `first` of the
/// volume. Each value depends only on the seed and the voxel's index.
pub(super) fn add_white_noise(voxels: &mut [f32], first: usize, seed: u64, stream: u32, sd: f64) {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut normals = [0.0; 4];
    let mut held = None;
    for (i, v) in voxels.iter_mut().enumerate() {
        let index = first + i;
        let block = index / 4;
        if held != Some(block) {
            let bits = philox4x32(key, [block as u32, (block as u64 >> 32) as u32, stream, 1]);
            let u = bits.map(|b| (f64::from(b) + 0.5) / 4_294_967_296.0);
            for pair in 0..2 {
                let radius = (-2.0 * u[2 * pair].ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * u[2 * pair + 1]).sin_cos();
                (normals[2 * pair], normals[2 * pair + 1]) = (radius * cos, radius * sin);
            }
            held = Some(block);
        }
        *v += (sd * normals[index % 4]) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_vanish_on_the_surface_and_have_unit_slope_there() {
        let rotation = Rotation::degrees(10.0, -20.0, 30.0);
        let e = Ellipsoid { centre: [1.0, 2.0, 3.0], radii: [10.0, 20.0, 30.0], rotation };
        // The pole of the first axis, rotated: undo() of it must be (10, 0, 0).
        let [a, b, c] = rotation.0;
        let pole = [1.0 + 10.0 * a[0], 2.0 + 10.0 * b[0], 3.0 + 10.0 * c[0]];
        assert!(e.distance(pole).abs() < 1e-9);
        let beyond = [pole[0] + 0.1 * a[0], pole[1] + 0.1 * b[0], pole[2] + 0.1 * c[0]];
        assert!((e.distance(beyond) - 0.1).abs() < 2e-3);
        assert!((e.distance(e.centre) + 10.0).abs() < 1e-9);
        assert!(superellipse(5.0, 0.0, 5.0, 3.0).abs() < 1e-9 && superellipse(0.0, -3.0, 5.0, 3.0).abs() < 1e-9);
        assert!(elliptic_cylinder(0.0, 3.0, 5.0, 3.0).abs() < 1e-9);
    }

    #[test]
    fn white_noise_does_not_depend_on_how_the_volume_is_cut() {
        let mut whole = vec![0.0; 103];
        add_white_noise(&mut whole, 0, 5, 9, 10.0);
        let mut parts = vec![0.0; 103];
        let (a, b) = parts.split_at_mut(37);
        add_white_noise(b, 37, 5, 9, 10.0);
        add_white_noise(a, 0, 5, 9, 10.0);
        assert_eq!(whole, parts);
        let mut many = vec![0.0; 40_000];
        add_white_noise(&mut many, 0, 5, 9, 10.0);
        let mean = many.iter().sum::<f32>() / 4e4;
        let sd = (many.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 4e4).sqrt();
        assert!(mean.abs() < 0.3 && (sd - 10.0).abs() < 0.2, "mean {mean}, sd {sd}");
    }
}
