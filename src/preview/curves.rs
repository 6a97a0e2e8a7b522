//! The course of a training as nnU-Net's `progress.png` shows it: losses and Dice, seconds of an epoch, learning rates.

use super::Picture;
use super::canvas::{Canvas, Rgb, text_height, text_width};

const WIDTH: usize = 1500;
const PANEL: usize = 800;
const MARGIN: Margin = Margin { left: 170, right: 170, top: 90, bottom: 110 };
const SCALE: usize = 3;
const BACKGROUND: Rgb = [255, 255, 255];
const PLOT: Rgb = [234, 234, 242];
const GRID: Rgb = [255, 255, 255];
const INK: Rgb = [38, 38, 38];
const BLUE: Rgb = [0, 0, 255];
const RED: Rgb = [255, 0, 0];
const GREEN: Rgb = [0, 128, 0];

struct Margin {
    left: usize,
    right: usize,
    top: usize,
    bottom: usize,
}

/// One number per epoch in each list; NaN leaves a gap. Lists may differ in length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Course<'a> {
    /// Mean loss in training.
    pub train_losses: &'a [f64],
    /// Mean loss in validation.
    pub val_losses: &'a [f64],
    /// Mean Dice of the foreground classes.
    pub mean_dice: &'a [f64],
    /// Its moving average.
    pub ema_dice: &'a [f64],
    /// Seconds of each epoch.
    pub seconds: &'a [f64],
    /// Learning rates.
    pub learning_rates: &'a [f64],
}

/// A curve with its name.
struct Curve<'a> {
    name: &'a str,
    values: &'a [f64],
    colour: Rgb,
    dotted: bool,
}

/// Draws a training's course.
#[must_use]
pub fn training(course: &Course<'_>) -> Picture {
    let mut canvas = Canvas::new(WIDTH, 3 * PANEL, BACKGROUND);
    let curve = |name, values, colour, dotted| Curve { name, values, colour, dotted };
    let losses = [curve("loss_tr", course.train_losses, BLUE, false), curve("loss_val", course.val_losses, RED, false)];
    let dice = [
        curve("pseudo dice", course.mean_dice, GREEN, true),
        curve("pseudo dice (mov. avg.)", course.ema_dice, GREEN, false),
    ];
    let epochs = course.train_losses.len().max(1);
    let mut panel = Panel::new(&mut canvas, 0, epochs);
    panel.draw(&losses, "loss", false, false);
    panel.draw(&dice, "pseudo dice", true, false);
    Panel::new(&mut canvas, 1, epochs).draw(
        &[curve("epoch duration", course.seconds, BLUE, false)],
        "time [s]",
        false,
        true,
    );
    Panel::new(&mut canvas, 2, epochs).draw(
        &[curve("learning rate", course.learning_rates, BLUE, false)],
        "learning rate",
        false,
        false,
    );
    let rgb = canvas.pixels.into_iter().flatten().collect();
    Picture { width: WIDTH as u32, height: 3 * PANEL as u32, rgb }
}

/// A plot, and where its next legend goes.
struct Panel<'c> {
    canvas: &'c mut Canvas,
    top: usize,
    epochs: usize,
    legend: usize,
}

impl<'c> Panel<'c> {
    /// The frame, the grid's upright lines and the epochs below.
    fn new(canvas: &'c mut Canvas, number: usize, epochs: usize) -> Self {
        let top = number * PANEL + MARGIN.top;
        canvas.fill(MARGIN.left, top, width(), height(), PLOT);
        let panel = Self { canvas, top, epochs, legend: MARGIN.left };
        for tick in ticks(0.0, (epochs - 1).max(1) as f64).into_iter().filter(|t| t.fract() == 0.0) {
            let x = panel.x(tick);
            panel.canvas.fill(x, top, 2, height(), GRID);
            let text = format!("{tick}");
            let left = x.saturating_sub(text_width(&text, SCALE) / 2);
            panel.canvas.text(left, top + height() + 12, SCALE, INK, &text);
        }
        let left = MARGIN.left + (width() - text_width("epoch", SCALE)) / 2;
        panel.canvas.text(left, top + height() + 24 + text_height(SCALE), SCALE, INK, "epoch");
        panel
    }

    fn x(&self, epoch: f64) -> usize {
        let most = (self.epochs - 1).max(1) as f64;
        MARGIN.left + (epoch / most * (width() - 1) as f64).round() as usize
    }

    /// Curves with an axis of their own, to the right if asked for.
    fn draw(&mut self, curves: &[Curve<'_>], axis: &str, right: bool, from_zero: bool) {
        let known = || curves.iter().flat_map(|c| c.values).copied().filter(|v| v.is_finite());
        let (lo, hi) = known().fold((f64::MAX, f64::MIN), |(lo, hi), v| (lo.min(v), hi.max(v)));
        let (lo, hi) = if lo > hi { (0.0, 1.0) } else { (if from_zero { 0.0 } else { lo }, hi) };
        // As matplotlib: a twentieth of the range on both sides.
        let pad = if hi > lo { 0.05 * (hi - lo) } else { (0.05 * hi.abs()).max(0.05) };
        let (lo, hi) = (if from_zero { lo } else { lo - pad }, hi + pad);
        let bottom = self.top + height() - 1;
        let y = |v: f64| bottom - ((v - lo) / (hi - lo) * (height() - 1) as f64).round() as usize;
        for tick in ticks(lo, hi) {
            if !right {
                self.canvas.fill(MARGIN.left, y(tick), width(), 2, GRID);
            }
            let text = number(tick, hi - lo);
            let left = if right {
                MARGIN.left + width() + 12
            } else {
                MARGIN.left.saturating_sub(12 + text_width(&text, SCALE))
            };
            self.canvas.text(left, y(tick).saturating_sub(text_height(SCALE) / 2), SCALE, INK, &text);
        }
        let left = if right { WIDTH - 20 - text_width(axis, SCALE) } else { 20 };
        self.canvas.text(left, self.top.saturating_sub(80), SCALE, INK, axis);
        for curve in curves {
            self.curve(curve, &y);
            let down = self.top.saturating_sub(40);
            self.line([self.legend, down + 10], [self.legend + 60, down + 10], curve.colour, curve.dotted);
            self.canvas.text(self.legend + 72, down, SCALE, INK, curve.name);
            self.legend += 72 + text_width(curve.name, SCALE) + 50;
        }
    }

    fn curve(&mut self, curve: &Curve<'_>, y: &dyn Fn(f64) -> usize) {
        let at = |i: usize| curve.values.get(i).filter(|v| v.is_finite()).map(|v| [self.x(i as f64), y(*v)]);
        let points: Vec<_> = (0..curve.values.len()).map(at).collect();
        for (i, point) in points.iter().enumerate() {
            let Some(to) = *point else { continue };
            let from = i.checked_sub(1).and_then(|before| points[before]);
            self.line(from.unwrap_or(to), to, curve.colour, curve.dotted);
        }
    }

    /// A line of four pixels' width.
    fn line(&mut self, from: [usize; 2], to: [usize; 2], colour: Rgb, dotted: bool) {
        let [x0, y0, x1, y1] = [from[0], from[1], to[0], to[1]].map(|v| v as f64);
        let steps = (x1 - x0).abs().max((y1 - y0).abs()).max(1.0) as usize;
        for i in 0..=steps {
            if dotted && i / 4 % 2 == 1 {
                continue;
            }
            let t = i as f64 / steps as f64;
            let (x, y) = ((x0 + t * (x1 - x0)).round() as usize, (y0 + t * (y1 - y0)).round() as usize);
            self.canvas.fill(x.saturating_sub(1), y.saturating_sub(1), 4, 4, colour);
        }
    }
}

fn width() -> usize {
    WIDTH - MARGIN.left - MARGIN.right
}

fn height() -> usize {
    PANEL - MARGIN.top - MARGIN.bottom
}

/// Up to nine round numbers from `lo` to `hi`.
fn ticks(lo: f64, hi: f64) -> Vec<f64> {
    let range = hi - lo;
    if !(range > 0.0 && range.is_finite()) {
        return Vec::new();
    }
    let power = 10f64.powf((range / 8.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|s| range / s <= 8.0).unwrap_or(range);
    let first = (lo / step).ceil() as i64;
    (first..=(hi / step).floor() as i64).map(|i| i as f64 * step).collect()
}

/// With as many digits as tell neighbouring ticks apart.
fn number(value: f64, range: f64) -> String {
    let digits = (1.0 - (range / 8.0).log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks(-0.93, 0.4), [-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4].map(|v: f64| (v * 5.0).round() * 0.2));
        assert_eq!(ticks(0.0, 99.0).len(), 5);
        assert!(ticks(1.0, 1.0).is_empty());
        assert_eq!(
            (number(0.25, 1.0), number(100.0, 400.0), number(0.0, 1.0)),
            ("0.25".into(), "100".into(), "0".into())
        );
    }

    #[test]
    fn any_course_can_be_drawn() {
        let nan = [f64::NAN, f64::NAN];
        let long: Vec<f64> = (0..1000).map(|i| f64::from(i).sin()).collect();
        for values in [&[][..], &[0.5], &nan, &[1.0, f64::INFINITY, -1.0], &long, &[1e300, -1e300], &[0.0; 7]] {
            let course = Course {
                train_losses: values,
                val_losses: values,
                mean_dice: values,
                ema_dice: &nan,
                seconds: values,
                learning_rates: values,
            };
            let picture = training(&course);
            assert_eq!(picture.rgb.len(), (picture.width * picture.height * 3) as usize);
        }
    }
}
