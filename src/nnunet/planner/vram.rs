//! The size of a network's feature maps, which stands for its memory (`compute_conv_feature_map_size` of
//! dynamic-network-architectures).

use super::topology::Topology;

/// What the estimate depends on besides the topology.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks<'a> {
    /// Channels of each stage.
    pub(super) features: &'a [usize],
    /// Convolutions of each encoder stage, or residual blocks of two.
    pub(super) encoder: &'a [usize],
    /// Convolutions of each decoder stage.
    pub(super) decoder: &'a [usize],
    /// Whether the encoder has residual blocks behind a stem.
    pub(super) residual: bool,
    /// Output channels.
    pub(super) classes: usize,
}

/// Elements of all outputs of convolutions for one patch, of one sample.
pub(super) fn feature_maps(topology: &Topology, blocks: Blocks<'_>) -> u64 {
    let Blocks { features, encoder, decoder, residual, classes } = blocks;
    let volume = |size: &[usize]| size.iter().map(|&n| n as u64).product::<u64>();
    let mut size = topology.patch.clone();
    let mut sum = if residual { features[0] as u64 * volume(&size) } else { 0 };
    let mut skips = Vec::with_capacity(topology.stages());
    for (stage, stride) in topology.strides.iter().enumerate() {
        let before = size.clone();
        size.iter_mut().zip(stride).for_each(|(n, s)| *n /= s);
        let convs = if residual {
            let changes = size != before || features[stage] != features[stage.saturating_sub(1)];
            2 * encoder[stage] + usize::from(changes)
        } else {
            encoder[stage]
        };
        sum += (convs * features[stage]) as u64 * volume(&size);
        skips.push(volume(&size));
    }
    for stage in (0..topology.stages() - 1).rev() {
        // The transposed convolution gives as much as one of the convolutions that follow it.
        let convs = decoder[topology.stages() - 2 - stage] + 1;
        sum += (convs * features[stage]) as u64 * skips[stage];
    }
    // Deep supervision is off while planning.
    if topology.stages() > 1 { sum + classes as u64 * skips[0] } else { sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(patch: &[f64], stages: usize, max: usize) -> (Topology, Vec<usize>) {
        let topology = Topology::new(&vec![1.0; patch.len()], patch);
        assert_eq!(topology.stages(), stages);
        (topology, (0..stages).map(|i| (32usize << i).min(max)).collect())
    }

    /// Values in nnU-Net's own source, less what the heads of deep supervision give there.
    #[test]
    fn reference_values() {
        let (topology, features) = network(&[128.0; 3], 6, 320);
        let heads: u64 = 3 * [64u64, 32, 16, 8].iter().map(|n| n.pow(3)).sum::<u64>();
        let mut blocks =
            Blocks { features: &features, encoder: &[2; 6], decoder: &[2; 5], residual: false, classes: 3 };
        assert_eq!(feature_maps(&topology, blocks), 453_694_976 - heads);
        (blocks.encoder, blocks.decoder, blocks.residual) = (&[1, 3, 4, 6, 6, 6], &[1; 5], true);
        assert_eq!(feature_maps(&topology, blocks), 558_319_104 - heads);
    }
}
