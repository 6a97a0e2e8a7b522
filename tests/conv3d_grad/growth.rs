//! How much larger than in a plain sum rounding errors grow where few products stand for many.

/// One of the products that stand for many along one axis: the sum of squares of what the inputs count in it, the squares of
/// what each tap counts in it, and of what it counts in each output.
type Point = (f64, [f64; 3], Vec<f64>);

/// The products of an axis by an implementation with so many outputs per tile: with infinity, points 0, +-a and +-b, at
/// stride 2 without 0, where the middle tap goes by itself.
fn points(kernel: usize, stride: usize, outputs: usize) -> Vec<Point> {
    let unit = |i: usize| (0..outputs).map(|o| if o == i { 1.0 } else { 0.0 }).collect::<Vec<f64>>();
    let mut all = Vec::new();
    match (kernel, stride, outputs) {
        (1, ..) => all.push((1.0, [1.0, 0.0, 0.0], vec![1.0])),
        (_, 1, 2) => {
            all.extend([(2.0, [1.0, 0.0, 0.0], unit(0)), (2.0, [0.0, 0.0, 1.0], unit(1))]);
            all.extend([0, 1].map(|_| (2.0, [0.25; 3], vec![1.0; 2])));
        }
        (_, _, 2) => {
            all.extend([(2.0, [1.0, 0.0, 0.0], unit(0)), (2.0, [0.0, 0.0, 1.0], unit(1))]);
            all.push((1.0, [1.0, 0.0, 1.0], vec![1.0; 2]));
            all.extend([0, 1].map(|i| (1.0, [0.0, 1.0, 0.0], unit(i))));
        }
        _ => {
            let [a, b]: [f64; 2] = if stride == 1 { [0.5, 2.0] } else { [0.375 * 0.375, 1.375 * 1.375] };
            let end = 1.0 + (a + b).powi(2) + (a * b).powi(2);
            for (p, q) in [(a, b), (a, b), (b, a), (b, a)] {
                let difference = if stride == 1 { 2.0 * p * (p - q) } else { 2.0 * p.sqrt() * (p - q) };
                let taps = if stride == 1 { [1.0, p, p * p] } else { [1.0, 0.0, p] };
                let powers = (0..4).map(|i| p.powi(i)).collect();
                all.push(((1.0 + q * q) * (1.0 + p), taps.map(|t| t / difference.powi(2)), powers));
            }
            all.push((end, [0.0, 0.0, 1.0], unit(3)));
            if stride == 1 {
                all.push((end, [1.0, 0.0, 0.0], unit(0)));
            } else {
                all.extend([0, 1, 2, 3].map(|i| (1.0, [0.0, 1.0, 0.0], unit(i))));
            }
        }
    }
    all
}

/// How much larger than in a plain sum rounding errors grow where few products stand for many, and outputs per tile along
/// each axis; none for implementations that do the plain sum. Independent errors add up as squares; along one axis they
/// grow by the root of a sum over the products of squares of what inputs, taps and outputs count in each.
pub struct Growth {
    pub input: f64,
    pub filter: f64,
    pub tile: [usize; 3],
}

pub fn growth(name: &str, kernel: [usize; 3], stride: [usize; 3]) -> Option<Growth> {
    let numbers = name.strip_prefix("winograd_")?.as_bytes();
    let tile = [0, 1, 2].map(|a| if kernel[a] == 1 { 1 } else { usize::from(numbers[a] - b'0') });
    let (mut input, mut filter) = (1.0, 1.0);
    for a in 0..3 {
        let points = points(kernel[a], stride[a], tile[a]);
        // A value of the convolution of the output's gradient: any one output, with all taps.
        let output = |i: usize| {
            let one =
                |(inputs, taps, outputs): &Point| inputs * taps.iter().fold(0.0, |m: f64, t| m.max(*t)) * outputs[i];
            points.iter().map(one).sum::<f64>()
        };
        input *= (0..tile[a]).map(output).fold(0.0, f64::max);
        // A weight: any one tap, with all outputs.
        let tap = |k: usize| {
            let one = |(inputs, taps, outputs): &Point| inputs * taps[k] * outputs.iter().sum::<f64>();
            points.iter().map(one).sum::<f64>()
        };
        filter *= (0..3).map(tap).fold(0.0, f64::max);
    }
    Some(Growth { input: input.sqrt(), filter: filter.sqrt(), tile })
}
