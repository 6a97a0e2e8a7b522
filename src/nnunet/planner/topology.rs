//! Where a U-Net pools, with which kernels (nnU-Net `get_pool_and_conv_props`).

/// Shortest edge of the bottleneck.
const MIN_EDGE: f64 = 4.0;

/// Poolings and kernels for a patch.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Topology {
    /// Stride of each stage, the first one's is 1.
    pub(super) strides: Vec<Vec<usize>>,
    /// Kernel of each stage.
    pub(super) kernels: Vec<Vec<usize>>,
    /// The patch, grown to multiples of `divisor`.
    pub(super) patch: Vec<usize>,
    /// Product of the strides along each axis.
    pub(super) divisor: Vec<usize>,
}

impl Topology {
    /// For voxels of `spacing` mm and `patch` voxels, which may be a median with a fraction.
    ///
    /// An axis is pooled while it is long enough and as fine as the others within a factor of two, and convolved along
    /// once it is that fine.
    pub(super) fn new(spacing: &[f64], patch: &[f64]) -> Self {
        let axes = spacing.len();
        let (mut step, mut size) = (spacing.to_vec(), patch.to_vec());
        let (mut kernel, mut divisor) = (vec![1; axes], vec![1; axes]);
        let (mut strides, mut kernels) = (vec![vec![1; axes]], Vec::new());
        loop {
            let long: Vec<usize> = (0..axes).filter(|&a| size[a] >= 2.0 * MIN_EDGE).collect();
            let finest = long.iter().map(|&a| step[a]).fold(f64::INFINITY, f64::min);
            let pooled: Vec<usize> = long.into_iter().filter(|&a| step[a] / finest < 2.0).collect();
            match pooled[..] {
                [] => break,
                [only] if size[only] < 3.0 * MIN_EDGE => break,
                _ => {}
            }
            let finest = step.iter().copied().fold(f64::INFINITY, f64::min);
            for (k, s) in kernel.iter_mut().zip(&step) {
                if s / finest < 2.0 {
                    *k = 3;
                }
            }
            let mut stride = vec![1; axes];
            for a in pooled {
                stride[a] = 2;
                divisor[a] *= 2;
                step[a] *= 2.0;
                size[a] = (size[a] / 2.0).ceil();
            }
            strides.push(stride);
            kernels.push(kernel.clone());
        }
        kernels.push(vec![3; axes]);
        // Within an image's size, or a step below 0.
        let grown = patch.iter().zip(&divisor).map(|(&p, &d)| (p.max(0.0) / d as f64).ceil() as usize * d).collect();
        Self { strides, kernels, patch: grown, divisor }
    }

    /// Number of stages.
    pub(super) fn stages(&self) -> usize {
        self.strides.len()
    }
}
