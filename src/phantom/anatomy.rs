//! One patient: the random parameters of a trunk and the tissue at any point of it.
//!
//! Lengths are in mm, attenuation in Hounsfield units; x points to the patient's right, y to the front, z upwards.
//! Sizes, places and attenuations are of an adult in the portal venous phase, round numbers of any anatomy atlas.

use super::label;
use super::shape::{
    Ellipsoid, Noise, Rotation, Vec3, elliptic_cylinder, length, smooth_union, smoothstep, superellipse,
};
use crate::base::rng::Rng;

const FAT: f64 = -105.0;
const AIR: f64 = -1000.0;

/// Random streams of one seed.
mod stream {
    pub(super) const ANATOMY: u64 = 1;
    pub(super) const COARSE: u64 = 2;
    pub(super) const COARSE_TOO: u64 = 3;
    pub(super) const FINE: u64 = 4;
}

/// Attenuation of each tissue in HU.
#[derive(Debug, Clone)]
struct Attenuation {
    muscle: f64,
    lung: f64,
    liver: f64,
    spleen: f64,
    kidney: f64,
    medulla: f64,
    aorta: f64,
    cava: f64,
    heart: f64,
    stomach: f64,
    trabecular: f64,
    cortical: f64,
    disc: f64,
}

/// All that distinguishes one patient from another.
#[derive(Debug, Clone)]
pub(super) struct Anatomy {
    scale: f64,
    shift: Vec3,
    rotation: Rotation,
    /// Half width and half depth of the trunk.
    trunk: [f64; 2],
    /// Thickness of the fat below the skin, and of the muscular wall.
    fat: f64,
    wall: f64,
    /// Height of the right and left dome of the diaphragm.
    domes: [f64; 2],
    lungs: [Ellipsoid; 2],
    heart: Ellipsoid,
    liver: [Ellipsoid; 2],
    spleen: Ellipsoid,
    kidneys: [Ellipsoid; 2],
    stomach: Ellipsoid,
    /// Height (y) of the fluid level in the stomach, relative to its centre; beyond its radius there is no gas.
    gas_level: f64,
    /// Side bend and forward bend of the spine: amplitude and phase.
    bend: [[f64; 2]; 2],
    /// Phase of the first vertebra, height of one with its disc, radii of its body.
    vertebra: [f64; 4],
    /// Radius of the aorta and its random offsets (x, y).
    aorta: [f64; 3],
    /// Phase and distance of the ribs.
    ribs: [f64; 2],
    hu: Attenuation,
    coarse: [Noise; 2],
    fine: Noise,
}

/// What is at a point.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tissue {
    pub(super) hu: f64,
    pub(super) label: u8,
}

impl Tissue {
    /// Fills the solid of signed distance `d` with `hu`. Its edge is about 2 mm wide, the blur of a scanner; the label
    /// changes sharply in the middle of it.
    fn fill(&mut self, d: f64, hu: f64, label: u8) {
        const EDGE_MM: f64 = 2.0;
        let covered = (0.5 - d / EDGE_MM).clamp(0.0, 1.0);
        self.hu += (hu - self.hu) * covered;
        if d < 0.0 {
            self.label = label;
        }
    }
}

/// Draws random shapes around their mean.
struct Draw(Rng);

impl Draw {
    fn around(&mut self, mean: f64, spread: f64) -> f64 {
        self.0.uniform(mean - spread, mean + spread)
    }

    /// An ellipsoid at `centre` give or take `move_by` mm, of `radii` give or take 8 %, turned by up to 6 degrees more
    /// than `turn`.
    fn ellipsoid(&mut self, centre: Vec3, radii: Vec3, turn: Vec3, move_by: f64) -> Ellipsoid {
        let size = self.around(1.0, 0.05);
        let centre = centre.map(|c| self.around(c, move_by));
        let radii = radii.map(|r| r * size * self.around(1.0, 0.04));
        let [x, y, z] = turn.map(|t| self.around(t, 6.0));
        Ellipsoid { centre, radii, rotation: Rotation::degrees(x, y, z) }
    }
}

impl Anatomy {
    /// The patient number `seed`.
    pub(super) fn new(seed: u64) -> Self {
        let mut draw = Draw(Rng::new(seed, stream::ANATOMY));
        let d = &mut draw;
        let liver_hu = d.around(110.0, 12.0);
        let spleen_hu = liver_hu + d.around(14.0, 8.0);
        let kidney_hu = d.around(185.0, 15.0);
        let aorta_hu = d.around(170.0, 20.0);
        Self {
            scale: d.around(1.0, 0.04),
            shift: [d.around(0.0, 4.0), d.around(0.0, 3.0), d.around(0.0, 8.0)],
            rotation: Rotation::degrees(d.around(0.0, 3.0), d.around(0.0, 2.0), d.around(0.0, 4.0)),
            trunk: [d.around(130.0, 3.0), d.around(93.0, 2.5)],
            fat: d.around(12.0, 4.0),
            wall: d.around(12.0, 1.5),
            domes: [d.around(40.0, 6.0), d.around(28.0, 6.0)],
            lungs: [
                d.ellipsoid([56.0, -2.0, 48.0], [50.0, 68.0, 104.0], [0.0, 8.0, 0.0], 3.0),
                d.ellipsoid([-56.0, -2.0, 48.0], [50.0, 68.0, 104.0], [0.0, -8.0, 0.0], 3.0),
            ],
            heart: d.ellipsoid([-17.0, 24.0, 74.0], [47.0, 36.0, 42.0], [0.0, 25.0, 20.0], 4.0),
            liver: [
                d.ellipsoid([54.0, 4.0, -10.0], [52.0, 60.0, 64.0], [0.0, 8.0, 0.0], 4.0),
                d.ellipsoid([0.0, 36.0, 2.0], [58.0, 25.0, 28.0], [0.0, -12.0, 6.0], 4.0),
            ],
            spleen: d.ellipsoid([-76.0, -22.0, 2.0], [28.0, 42.0, 48.0], [-12.0, 0.0, 24.0], 4.0),
            kidneys: [
                d.ellipsoid([62.0, -28.0, -78.0], [25.0, 24.0, 50.0], [8.0, -12.0, 0.0], 4.0),
                d.ellipsoid([-62.0, -28.0, -72.0], [25.0, 24.0, 52.0], [8.0, 12.0, 0.0], 4.0),
            ],
            stomach: d.ellipsoid([-44.0, 30.0, -6.0], [31.0, 27.0, 38.0], [0.0, 20.0, -20.0], 5.0),
            gas_level: d.around(18.0, 14.0),
            bend: [[d.around(0.0, 4.0), d.around(0.0, 3.0)], [d.around(5.0, 2.0), d.around(0.6, 0.6)]],
            vertebra: [d.around(0.0, 15.0), d.around(31.0, 2.0), d.around(23.0, 1.5), d.around(18.0, 1.5)],
            aorta: [d.around(12.5, 1.2), d.around(0.0, 2.0), d.around(0.0, 2.0)],
            ribs: [d.around(0.0, 12.0), d.around(27.0, 2.0)],
            hu: Attenuation {
                muscle: d.around(58.0, 6.0),
                lung: d.around(-850.0, 30.0),
                liver: liver_hu,
                spleen: spleen_hu,
                kidney: kidney_hu,
                medulla: kidney_hu - d.around(35.0, 15.0),
                aorta: aorta_hu,
                cava: aorta_hu - d.around(25.0, 15.0),
                heart: aorta_hu - d.around(20.0, 15.0),
                stomach: d.around(25.0, 15.0),
                trabecular: d.around(190.0, 40.0),
                cortical: d.around(480.0, 80.0),
                disc: d.around(90.0, 15.0),
            },
            coarse: [Noise::new(seed, stream::COARSE, 21.0), Noise::new(seed, stream::COARSE_TOO, 17.0)],
            fine: Noise::new(seed, stream::FINE, 5.0),
        }
    }

    /// The tissue at position `p` of the patient (mm, RAS+).
    pub(super) fn at(&self, p: Vec3) -> Tissue {
        let q = self.rotation.undo([0, 1, 2].map(|i| p[i] - self.shift[i])).map(|v| v / self.scale);
        let [x, y, z] = q;
        let grain = self.fine.at(q);
        let mut t = Tissue { hu: AIR, label: label::BACKGROUND };

        // Chest and hips are wider than the waist.
        let girth = ((z - 90.0) / 140.0 * std::f64::consts::PI).cos();
        let trunk = superellipse(x, y, self.trunk[0] + 6.0 * girth, self.trunk[1] + 3.0 * girth);
        if trunk > 4.0 {
            return t;
        }
        let coarse = [self.coarse[0].at(q), self.coarse[1].at(q)];
        let cavity = trunk + self.fat + self.wall;
        t.fill(trunk, 15.0, label::BACKGROUND);
        t.fill(trunk + 2.5, FAT + 6.0 * grain, label::BACKGROUND);
        t.fill(trunk + self.fat, self.hu.muscle + 7.0 * grain, label::BACKGROUND);
        self.fill_cavity(&mut t, q, cavity, coarse);
        self.fill_ribs(&mut t, q, cavity);
        self.fill_muscles(&mut t, q, grain);

        let spine = self.spine(q);
        let aorta = self.aorta(q).max(1.0 - spine.outer);
        let cava = {
            let [cx, cy] = self.spine_axis(z);
            let d = elliptic_cylinder(x - cx - 20.0, y - cy - self.vertebra[3] - 12.0, 11.0, 9.0);
            d.max(z - 62.0).max(1.5 - spine.outer).max(2.0 - aorta)
        };
        let diaphragm = self.diaphragm(x, y, z);
        self.fill_chest(&mut t, q, cavity, diaphragm, spine.outer, aorta, coarse, grain);
        self.fill_abdomen(&mut t, q, cavity, diaphragm, spine.outer, aorta, coarse, grain);
        t.fill(cava, self.hu.cava + 3.0 * grain, label::BACKGROUND);
        t.fill(aorta, self.hu.aorta + 3.0 * grain, label::AORTA);
        self.fill_spine(&mut t, &spine, grain);
        t
    }

    /// Signed distance to the diaphragm: positive above. Two domes, the right one higher.
    fn diaphragm(&self, x: f64, y: f64, z: f64) -> f64 {
        let dome = |top: f64, cx: f64| {
            // It falls steeply towards the ribs and gently towards the midline.
            let width = if (x - cx) * cx > 0.0 { 62.0 } else { 92.0 };
            let (u, v) = ((x - cx) / width, (y - 4.0) / 78.0);
            top - 70.0 * (u * u + v * v)
        };
        let height = -smooth_union(-dome(self.domes[0], 52.0), -dome(self.domes[1], -54.0), 14.0);
        // The surface is steep at the wall: the vertical distance exceeds the true one there.
        let slope = smoothstep(20.0, -30.0, height);
        (z - height) * (0.9 - 0.4 * slope)
    }

    /// Centre (x, y) of the vertebral bodies at height `z`.
    fn spine_axis(&self, z: f64) -> [f64; 2] {
        let [side, forward] = self.bend;
        [side[0] * (z / 95.0 + side[1]).sin(), -41.0 + forward[0] * (z / 85.0 + forward[1]).sin()]
    }

    fn aorta(&self, [x, y, z]: Vec3) -> f64 {
        let [cx, cy] = self.spine_axis(z);
        let [radius, dx, dy] = self.aorta;
        // Left of the spine in the chest, before it in the abdomen.
        let down = smoothstep(70.0, -60.0, z);
        let ax = cx - 31.0 + 20.0 * down + dx;
        let ay = cy + 12.0 + (self.vertebra[3] + radius - 10.0) * down + dy;
        (x - ax).hypot(y - ay) - radius
    }

    /// Bowel in fat below, mediastinal fat and soft tissue above.
    fn fill_cavity(&self, t: &mut Tissue, q: Vec3, cavity: f64, coarse: [f64; 2]) {
        let below = smoothstep(10.0, -20.0, q[2]);
        let front = smoothstep(-20.0, 0.0, q[1]);
        let bowel = smoothstep(0.0, 0.15, coarse[0] + 0.4 * coarse[1]) * below * front;
        let soft = smoothstep(0.2, 0.5, coarse[1]) * 0.6 * (1.0 - below);
        let hu = FAT + (self.hu.stomach + 20.0 - FAT) * bowel.max(soft);
        t.fill(cavity, hu, label::BACKGROUND);
    }

    fn fill_ribs(&self, t: &mut Tissue, [x, y, z]: Vec3, cavity: f64) {
        let [phase, period] = self.ribs;
        // Ribs descend from the spine to the front, and leave the front to the breastbone.
        let along = z + 0.35 * y - phase;
        let off = along - (along / period).round() * period;
        let gap = smoothstep(35.0, 20.0, x.abs()) * 8.0;
        let rib = (cavity - 6.0).hypot(off * 0.85) - 4.6 + gap;
        let lowest = -28.0 - 0.35 * y - z;
        t.fill(rib.max(lowest), self.hu.cortical * 0.7, label::BACKGROUND);
        let sternum = (cavity - 7.0).abs() - 4.5;
        t.fill(sternum.max(x.abs() - 16.0).max(-y).max(52.0 - z), self.hu.cortical * 0.55, label::BACKGROUND);
    }

    /// Psoas and the muscles along the back.
    fn fill_muscles(&self, t: &mut Tissue, [x, y, z]: Vec3, grain: f64) {
        let [cx, cy] = self.spine_axis(z);
        let side = (x - cx).abs();
        let back = elliptic_cylinder(side - 26.0, y - cy + 31.0, 24.0, 15.0);
        let thick = 9.0 + 9.0 * smoothstep(0.0, -110.0, z);
        let psoas = elliptic_cylinder(side - 34.0, y - cy - 2.0, thick, thick + 3.0).max(z + 10.0);
        t.fill(back.min(psoas), self.hu.muscle + 7.0 * grain, label::BACKGROUND);
    }

    /// Lungs with vessels, heart, windpipe.
    fn fill_chest(
        &self,
        t: &mut Tissue,
        q: Vec3,
        cavity: f64,
        diaphragm: f64,
        spine: f64,
        aorta: f64,
        coarse: [f64; 2],
        grain: f64,
    ) {
        if diaphragm < -6.0 {
            return;
        }
        let heart = self.heart.distance(q).max(3.0 - diaphragm).max(2.0 - aorta);
        // Where two random surfaces cross they leave curved tubes: vessels.
        let vessel = smoothstep(0.16, 0.05, coarse[0].hypot(coarse[1]));
        let hu = self.hu.lung + 35.0 * grain + 700.0 * vessel;
        let around = (cavity + 3.0).max(2.0 - diaphragm).max(3.0 - spine).max(2.5 - aorta).max(5.0 - heart);
        for (side, (lung, name)) in self.lungs.iter().zip([label::LUNG_RIGHT, label::LUNG_LEFT]).enumerate() {
            let medial = if side == 0 { 13.0 - q[0] } else { 13.0 + q[0] };
            t.fill(lung.distance(q).max(around).max(medial), hu, name);
        }
        t.fill(heart, self.hu.muscle + 45.0 + 4.0 * grain, label::BACKGROUND);
        // Two chambers on either side of a septum, blood within.
        let v = [0, 1, 2].map(|i| q[i] - self.heart.centre[i]);
        let septum = 4.5 - (0.75 * v[0] + 0.55 * v[1] - 0.35 * v[2]).abs();
        t.fill((heart + 8.0).max(septum), self.hu.heart + 3.0 * grain, label::BACKGROUND);
        let trachea = (q[0] - 2.0).hypot(q[1] + 4.0) - 8.5;
        t.fill(trachea.max(104.0 - q[2]), AIR + 30.0, label::BACKGROUND);
    }

    /// Stomach, spleen, kidneys and liver.
    fn fill_abdomen(
        &self,
        t: &mut Tissue,
        q: Vec3,
        cavity: f64,
        diaphragm: f64,
        spine: f64,
        aorta: f64,
        coarse: [f64; 2],
        grain: f64,
    ) {
        if diaphragm > 4.0 || cavity > 4.0 {
            return;
        }
        // Every organ keeps its distance from the wall, the diaphragm and the midline structures.
        let room = (cavity + 2.5).max(diaphragm + 2.5).max(2.5 - spine).max(2.5 - aorta);
        let stomach = self.stomach.distance(q).max(room);
        t.fill(stomach, self.hu.muscle, label::BACKGROUND);
        let gas = self.stomach.centre[1] + self.gas_level - q[1];
        t.fill(stomach + 4.0, self.hu.stomach + 12.0 * coarse[0], label::BACKGROUND);
        t.fill((stomach + 4.5).max(gas), AIR + 40.0, label::BACKGROUND);

        let whole_kidneys = self.kidneys.map(|k| k.distance(q));
        let nearest_kidney = whole_kidneys[0].min(whole_kidneys[1]);
        let spleen = self.spleen.distance(q).max(room).max(2.0 - stomach).max(2.5 - nearest_kidney);
        t.fill(spleen, self.hu.spleen + 5.0 * grain, label::SPLEEN);

        for (side, (kidney, name)) in self.kidneys.iter().zip([label::KIDNEY_RIGHT, label::KIDNEY_LEFT]).enumerate() {
            let whole = whole_kidneys[side];
            if whole > 4.0 {
                continue;
            }
            let medial = if side == 0 { -1.0 } else { 1.0 };
            let [cx, cy, cz] = kidney.centre;
            let v = [q[0] - cx - medial * 22.0, q[1] - cy - 6.0, (q[2] - cz) * 0.7];
            let sinus = length(v) - 15.0;
            let solid = whole.max(room).max(-sinus);
            // Pyramids: darker grains below a bright cortex.
            let pyramid = smoothstep(-5.0, -8.0, whole) * smoothstep(-0.2, 0.3, coarse[1] + 0.5 * grain);
            let hu = self.hu.kidney + (self.hu.medulla - self.hu.kidney) * pyramid;
            t.fill(solid, hu + 4.0 * grain, name);
        }

        let lobes = smooth_union(self.liver[0].distance(q), self.liver[1].distance(q), 18.0);
        let liver = lobes.max(room).max(3.5 - nearest_kidney).max(2.5 - stomach).max(2.0 - spleen);
        let vessel = smoothstep(0.14, 0.04, (coarse[0] - 0.1).hypot(coarse[1] + 0.1));
        t.fill(liver, self.hu.liver + 5.0 * grain + 32.0 * vessel, label::LIVER);
    }

    /// Distances of the spine's parts: the label covers `outer`, canal included.
    fn spine(&self, [x, y, z]: Vec3) -> Spine {
        let [cx, cy] = self.spine_axis(z);
        let [phase, period, rx, ry] = self.vertebra;
        let (u, v) = (x - cx, y - cy);
        let turn = (z - phase) / period;
        // 0 in the middle of a vertebra, 0.5 in the middle of a disc.
        let along = (turn - turn.round()).abs();
        let waist = 1.0 - 0.09 * smoothstep(0.3, 0.0, along);
        let body = elliptic_cylinder(u, v, rx * waist, ry * waist);
        let behind = ry + 7.0;
        let canal = u.hypot(v + behind) - 8.0;
        let arch = u.hypot(v + behind) - 14.5;
        let mm = along * period;
        let spinous = (u.abs() - 5.5).max((v + behind + 16.0).abs() - 10.0).max(mm - 10.0);
        let transverse = (v + behind - 2.0).hypot(mm) - 7.0;
        let transverse = transverse.max(u.abs() - 32.0);
        let outer = smooth_union(smooth_union(body, arch, 6.0), spinous.min(transverse), 5.0);
        Spine { outer, body, canal, disc: (0.40 - along) * period }
    }

    fn fill_spine(&self, t: &mut Tissue, spine: &Spine, grain: f64) {
        // Dense shell, spongy core, discs between the bodies, and the canal through the arches.
        t.fill(spine.outer, self.hu.cortical, label::SPINE);
        t.fill(spine.outer + 2.5, self.hu.trabecular + 25.0 * grain, label::SPINE);
        t.fill(spine.body.max(spine.disc), self.hu.disc, label::SPINE);
        t.fill(spine.canal.max(1.0 - spine.body), 30.0, label::SPINE);
    }
}

/// Signed distances of the parts of the spine; `disc` is along the axis only.
struct Spine {
    outer: f64,
    body: f64,
    canal: f64,
    disc: f64,
}
