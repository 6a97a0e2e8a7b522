//! An RGB canvas with rectangles and text.

use super::font;

/// Red, green, blue.
pub(super) type Rgb = [u8; 3];

/// Pixels being painted, row by row from the top left.
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) pixels: Vec<Rgb>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, background: Rgb) -> Self {
        Self { width, height, pixels: vec![background; width * height] }
    }

    /// Sets one pixel; outside the canvas nothing happens.
    pub(super) fn set(&mut self, x: usize, y: usize, colour: Rgb) {
        if x < self.width && y < self.height {
            self.pixels[y * self.width + x] = colour;
        }
    }

    pub(super) fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Rgb) {
        for j in y..(y + height).min(self.height) {
            for i in x..(x + width).min(self.width) {
                self.pixels[j * self.width + i] = colour;
            }
        }
    }

    /// Text with its top left corner at (x, y); every font pixel becomes `scale` pixels, its corners rounded.
    pub(super) fn text(&mut self, x: usize, y: usize, scale: usize, colour: Rgb, text: &str) {
        for (i, c) in text.chars().enumerate() {
            let glyph = font::glyph(c);
            let drop = if font::hangs(c) { font::DESCENT } else { 0 };
            let left = x + i * (font::WIDTH + 1) * scale;
            for row in 0..font::HEIGHT * scale {
                for column in 0..font::WIDTH * scale {
                    if smooth(&glyph, column, row, scale) {
                        self.set(left + column, y + drop * scale + row, colour);
                    }
                }
            }
        }
    }
}

/// Whether a pixel of the enlarged glyph is set. A diagonal step gets its inner corner filled and its outer corner
/// cut, as pixel art is usually enlarged.
fn smooth(glyph: &[u8; font::HEIGHT], column: usize, row: usize, scale: usize) -> bool {
    let on = |c: isize, r: isize| {
        (0..font::WIDTH as isize).contains(&c)
            && (0..font::HEIGHT as isize).contains(&r)
            && glyph[r as usize] >> (font::WIDTH as isize - 1 - c) & 1 == 1
    };
    let (c, r) = ((column / scale) as isize, (row / scale) as isize);
    // The corner of its font pixel that this pixel is nearest to; none on the middle lines.
    let side = |i: usize| ((2 * (i % scale) + 1) as isize - scale as isize).signum();
    let (h, v) = (side(column), side(row));
    let inside = on(c, r);
    if h == 0 || v == 0 {
        return inside;
    }
    let (beside, above, corner) = (on(c + h, r), on(c, r + v), on(c + h, r + v));
    let (opposite_beside, opposite_above) = (on(c - h, r), on(c, r - v));
    if inside {
        let lone = !beside && !above && !corner;
        !(lone && opposite_beside != opposite_above && scale > 2)
    } else {
        beside && above && !corner && !opposite_beside && !opposite_above && scale > 1
    }
}

/// Width in pixels of `text` at `scale`.
pub(super) fn text_width(text: &str, scale: usize) -> usize {
    (text.chars().count() * (font::WIDTH + 1)).saturating_sub(1) * scale
}

/// Height of a line of text at `scale`, descenders included.
pub(super) fn text_height(scale: usize) -> usize {
    (font::HEIGHT + font::DESCENT) * scale
}

/// The colour number `index`: the first are chosen to be told apart on grey, the later ones walk round the colour
/// circle by the golden angle with changing lightness, so that neighbours always differ.
pub(super) fn colour(index: usize) -> Rgb {
    const FIRST: [Rgb; 16] = [
        [86, 156, 255],
        [64, 210, 230],
        [226, 108, 72],
        [178, 102, 224],
        [255, 204, 64],
        [255, 146, 176],
        [120, 214, 104],
        [240, 58, 70],
        [255, 150, 50],
        [44, 172, 140],
        [206, 226, 110],
        [120, 110, 240],
        [206, 140, 96],
        [232, 96, 200],
        [150, 200, 255],
        [164, 160, 70],
    ];
    if let Some(&c) = FIRST.get(index) {
        return c;
    }
    let hue = (index as f64 * 0.381_966_011_25).fract() * 6.0;
    let (saturation, value) = ([0.75, 0.55, 0.9][index % 3], [1.0, 0.85, 0.7][index / 3 % 3]);
    // HSV to RGB.
    [5.0, 3.0, 1.0].map(|n: f64| {
        let k = (n + hue) % 6.0;
        (255.0 * value * (1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0))).round() as u8
    })
}
