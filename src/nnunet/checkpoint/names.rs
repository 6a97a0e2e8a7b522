//! The names under which networks of nnU-Net v2 store their parameters, some of them several times.

/// Every name of a state dict of nnU-Net with the place of its parameter in `names`, PyTorch's own names in the order of
/// registration. Blocks of nnU-Net's networks list their convolution and norm once more as `all_modules`, decoders their
/// whole encoder; loading with `strict=True` expects all of them. Other networks have each name once.
pub(super) fn state_dict(names: &[&str]) -> Vec<(String, usize)> {
    let (encoder, others): (Vec<usize>, Vec<usize>) = (0..names.len()).partition(|&i| names[i].starts_with("encoder."));
    if encoder.is_empty() || !others.iter().all(|&i| names[i].starts_with("decoder.")) {
        return names.iter().enumerate().map(|(i, n)| (n.to_string(), i)).collect();
    }
    let encoder = with_blocks(names, &encoder);
    let again = encoder.iter().map(|(n, i)| (format!("decoder.{n}"), *i));
    encoder.iter().cloned().chain(again).chain(with_blocks(names, &others)).collect()
}

/// The block that a parameter belongs to, and the end of its other name.
fn block(name: &str) -> Option<(&str, String)> {
    let (layer, last) = name.rsplit_once('.')?;
    let (block, part) = layer.rsplit_once('.')?;
    let at = match part {
        "conv" => 0,
        "norm" => 1,
        _ => return None,
    };
    Some((block, format!("all_modules.{at}.{last}")))
}

fn with_blocks(names: &[&str], which: &[usize]) -> Vec<(String, usize)> {
    let of = |i: &usize| block(names[*i]).map(|b| b.0);
    let mut out = Vec::new();
    for group in which.chunk_by(|a, b| of(a).is_some() && of(a) == of(b)) {
        out.extend(group.iter().map(|&i| (names[i].to_string(), i)));
        let again = group.iter().filter_map(|&i| block(names[i]).map(|(b, end)| (format!("{b}.{end}"), i)));
        out.extend(again);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The state dict of dynamic-network-architectures 0.4.4's PlainConvUNet with one convolution per stage, and of a block
    /// with a projection of its ResidualEncoderUNet.
    #[test]
    fn every_name_that_nnunet_stores() {
        let layers = |p: &str, parts: &[&str]| parts.iter().map(|q| format!("{p}.{q}")).collect::<Vec<String>>();
        let both = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"];
        let again = ["all_modules.0.weight", "all_modules.0.bias", "all_modules.1.weight", "all_modules.1.bias"];
        let up = ["decoder.transpconvs.0.weight", "decoder.seg_layers.0.weight"].map(String::from).to_vec();
        let (e, d) = ("encoder.stages.0.0.convs.0", "decoder.stages.0.convs.0");
        let names = [layers(e, &both), layers(d, &both), up.clone()].concat();
        let expected = [
            layers(e, &both),
            layers(e, &again),
            layers(&format!("decoder.{e}"), &both),
            layers(&format!("decoder.{e}"), &again),
            layers(d, &both),
            layers(d, &again),
            up,
        ]
        .concat();
        let found = state_dict(&names.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(found.iter().map(|f| f.0.clone()).collect::<Vec<_>>(), expected);
        assert!(found.iter().filter(|f| f.1 == 0).count() == 4 && found[4].1 == 0 && found[8].1 == 0);
        let skip = ["encoder.stages.1.blocks.0.skip.1.conv.weight", "encoder.stages.1.blocks.0.skip.1.norm.weight"];
        let found = state_dict(&skip);
        assert_eq!(found[2].0, "encoder.stages.1.blocks.0.skip.1.all_modules.0.weight");
        assert_eq!((found.len(), found[3].1), (8, 1));
    }

    #[test]
    fn a_stunet_has_each_name_once() {
        let names = ["conv_blocks_context.0.0.conv1.weight", "upsample_layers.0.conv.weight", "seg_outputs.0.weight"];
        assert_eq!(state_dict(&names).into_iter().map(|f| f.0).collect::<Vec<_>>(), names);
    }
}
