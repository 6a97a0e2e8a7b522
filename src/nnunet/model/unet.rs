//! nnU-Net's U-Nets: their sizes told from tensors, and read from plans.

use crate::error::{Error, Result};
use crate::io::weights::{Weights, printable};
use crate::models::{STEM, UnetConfig, UnetKind};
use crate::nnunet::json::Field;

/// The largest number that a size in plans may be: keeps products far from overflow.
const MAX_SIZE: usize = 1 << 16;

/// Tells a U-Net from its tensors; `None` where they are none's.
pub(super) fn infer(weights: &Weights) -> Result<Option<UnetConfig>> {
    let has = |name: &str| weights.shape(name).is_some();
    let weight = |module: String| format!("{module}.weight");
    let conv = |module: String| weight(format!("{module}.conv"));
    let first = |kind: UnetKind| match kind {
        UnetKind::ResEnc => conv(STEM.into()),
        UnetKind::Plain | UnetKind::Generic => conv(kind.encoder_conv(0, false, 0, 1)),
    };
    let kinds = [UnetKind::ResEnc, UnetKind::Plain, UnetKind::Generic];
    let Some(kind) = kinds.into_iter().find(|k| has(&first(*k))) else { return Ok(None) };
    let count = |name: &dyn Fn(usize) -> String| (0..).take_while(|&i| has(&name(i))).count();
    // The last of nnU-Net 1's convolutions of the coarsest stage and of a decoder stage has a name of its own: it is asked for
    // those before it.
    let (last, apart) = match kind {
        UnetKind::Plain | UnetKind::ResEnc => (usize::MAX, 0),
        UnetKind::Generic => (count(&|s| conv(kind.encoder_conv(s, false, 0, 1))), 1),
    };
    let part = |s: usize, i: usize| conv(kind.encoder_conv(s, s == last, i, usize::MAX));
    let decoder = |u: usize, i: usize| conv(kind.decoder_conv(u, i, usize::MAX));
    let filter = |name: String| Filter::read(weights, kind, name);
    let first = filter(first(kind))?;
    let stages = count(&|s| part(s, 0));
    let levels = stages.saturating_sub(1);
    let (mut features, mut kernels) = (Vec::new(), Vec::new());
    for s in 0..stages {
        let filter = filter(part(s, 0))?;
        features.push(filter.channels[0]);
        kernels.push(filter.space);
    }
    let mut strides = vec![[1; 3]];
    for u in (0..levels).rev() {
        strides.push(filter(weight(kind.up(u)))?.space);
    }
    let sizes = UnetConfig {
        kind,
        in_channels: first.channels[1],
        classes: filter(weight(kind.head(0)))?.channels[0],
        features,
        kernels,
        strides,
        depth: (0..stages).map(|s| count(&|i| part(s, i)) + usize::from(s == last)).collect(),
        decoder_depth: (0..levels).map(|u| count(&|i| decoder(u, i)) + apart).collect(),
        conv_bias: has(&first.name.replace(".weight", ".bias")),
        head_bias: has(&format!("{}.bias", kind.head(0))),
        planar: first.planar,
    };
    let at = |e: Error| Error::unsupported(format!("{}: {}", weights.path().display(), text(e)));
    sizes.validate().map_err(at)?;
    Ok(Some(sizes))
}

/// The network that a configuration of `plans.json` asks for, with so many input channels and classes.
///
/// # Errors
/// [`Error::Model`] naming the key that is missing or of the wrong kind, [`Error::Unsupported`] naming the kind,
/// operation or size that there is nothing for.
pub(super) fn from_plans(conf: &Field<'_>, in_channels: usize, classes: usize) -> Result<UnetConfig> {
    let sizes = match conf.get("architecture") {
        Some(a) => from_architecture(&a, in_channels, classes)?,
        None => from_old_plans(conf, in_channels, classes)?,
    };
    sizes.validate()?;
    Ok(sizes)
}

fn from_architecture(a: &Field<'_>, in_channels: usize, classes: usize) -> Result<UnetConfig> {
    let kind = class(&a.need("network_class_name")?)?;
    let kwargs = a.need("arch_kwargs")?;
    let depth_key = match kind {
        UnetKind::Plain => "n_conv_per_stage",
        UnetKind::ResEnc => "n_blocks_per_stage",
        UnetKind::Generic => return Err(a.error("a network of nnU-Net 1")),
    };
    let mut planar = None;
    let mut seen = Vec::new();
    for (key, value) in kwargs.entries()? {
        seen.push(key);
        match (key, value.value.as_str()) {
            ("conv_op", Some(op)) => planar = planar_op(op, "Conv"),
            ("norm_op", Some(op)) if planar_op(op, "InstanceNorm").is_some() => continue,
            ("nonlin", Some("torch.nn.LeakyReLU" | "torch.nn.modules.activation.LeakyReLU")) => continue,
            ("norm_op_kwargs", _) => instance_norm(&value)?,
            ("nonlin_kwargs", _) => leaky_relu(&value)?,
            ("dropout_op" | "dropout_op_kwargs", None) if value.value.is_null() => continue,
            ("n_stages" | "features_per_stage" | "kernel_sizes" | "strides" | "conv_bias", _) => continue,
            ("n_conv_per_stage_decoder", _) => continue,
            (key, _) if key == depth_key => continue,
            _ => {
                let what = printable(&value.value.to_string());
                return Err(Error::unsupported(format!("{} {what} of {}", printable(key), kind.class_name())));
            }
        }
        if key == "conv_op" && planar.is_none() {
            return Err(Error::unsupported(format!("conv_op {}; Conv2d and Conv3d are", value.value)));
        }
    }
    // What is absent would be another network by the class's own defaults.
    for key in ["norm_op", "nonlin", "norm_op_kwargs"] {
        if !seen.contains(&key) {
            kwargs.need(key)?;
        }
    }
    let planar = planar.ok_or_else(|| kwargs.error("conv_op: missing"))?;
    let stages = kwargs.need("n_stages")?.usize(MAX_SIZE)?;
    let features = numbers(&kwargs.need("features_per_stage")?, stages)?;
    Ok(UnetConfig {
        kind,
        in_channels,
        classes,
        kernels: triples(&kwargs.need("kernel_sizes")?, planar)?,
        strides: triples(&kwargs.need("strides")?, planar)?,
        depth: numbers(&kwargs.need(depth_key)?, stages)?,
        decoder_depth: numbers(&kwargs.need("n_conv_per_stage_decoder")?, stages.saturating_sub(1))?,
        conv_bias: kwargs.need("conv_bias")?.bool()?,
        head_bias: true,
        features,
        planar,
    })
}

/// Plans of nnU-Net 2.2 and before.
fn from_old_plans(conf: &Field<'_>, in_channels: usize, classes: usize) -> Result<UnetConfig> {
    let kind = class(&conf.need("UNet_class_name")?)?;
    let kernels = conf.need("conv_kernel_sizes")?;
    let planar = kernels.items()?.first().is_some_and(|k| k.value.as_array().is_some_and(|k| k.len() == 2));
    let kernels = triples(&kernels, planar)?;
    let base = conf.need("UNet_base_num_features")?.usize(MAX_SIZE)?;
    let most = conf.need("unet_max_num_features")?.usize(MAX_SIZE)?;
    let stages = kernels.len();
    let doubled = |s: usize| u32::try_from(s).ok().and_then(|s| 2usize.checked_pow(s)).unwrap_or(usize::MAX);
    Ok(UnetConfig {
        kind,
        in_channels,
        classes,
        features: (0..stages).map(|s| base.saturating_mul(doubled(s)).min(most)).collect(),
        strides: triples(&conf.need("pool_op_kernel_sizes")?, planar)?,
        depth: numbers(&conf.need("n_conv_per_stage_encoder")?, stages)?,
        decoder_depth: numbers(&conf.need("n_conv_per_stage_decoder")?, stages.saturating_sub(1))?,
        kernels,
        conv_bias: true,
        head_bias: true,
        planar,
    })
}

/// An error's message without what an unsupported thing's begins with.
fn text(e: Error) -> String {
    match e {
        Error::Unsupported { what } => what,
        e => e.to_string(),
    }
}

fn class(field: &Field<'_>) -> Result<UnetKind> {
    let name = field.str()?;
    UnetKind::of_class(name).ok_or_else(|| {
        let what = format!("network class {:?}; PlainConvUNet and ResidualEncoderUNet are", printable(name));
        Error::unsupported(what)
    })
}

/// Whether an operation of PyTorch is the 2D one of its family, which is what its name begins with.
fn planar_op(op: &str, family: &str) -> Option<bool> {
    let name = op.strip_prefix("torch.nn.")?;
    match name.rsplit('.').next()?.strip_prefix(family)? {
        "2d" => Some(true),
        "3d" => Some(false),
        _ => None,
    }
}

fn instance_norm(kwargs: &Field<'_>) -> Result<()> {
    let (eps, affine) = (kwargs.get("eps"), kwargs.get("affine"));
    let eps = eps.map_or(Ok(1e-5), |e| e.f64())?;
    let known = kwargs.entries()?.iter().all(|(k, _)| matches!(*k, "eps" | "affine"));
    if !known || eps != 1e-5 || !affine.map_or(Ok(false), |a| a.bool())? {
        return Err(Error::unsupported(format!("norm_op_kwargs {}; eps 1e-5 and affine true are", kwargs.value)));
    }
    Ok(())
}

fn leaky_relu(kwargs: &Field<'_>) -> Result<()> {
    if kwargs.value.is_null() {
        return Ok(());
    }
    let known = kwargs.entries()?.iter().all(|(k, _)| matches!(*k, "inplace" | "negative_slope"));
    let slope = kwargs.get("negative_slope").map_or(Ok(0.01), |s| s.f64())?;
    if !known || slope != 0.01 {
        return Err(Error::unsupported(format!("nonlin_kwargs {}; negative_slope 0.01 is", kwargs.value)));
    }
    Ok(())
}

/// A list of sizes, or one size for all.
fn numbers(field: &Field<'_>, len: usize) -> Result<Vec<usize>> {
    let list = match field.value.is_array() {
        true => field.items()?.iter().map(|f| f.usize(MAX_SIZE)).collect::<Result<Vec<_>>>()?,
        false => vec![field.usize(MAX_SIZE)?; len.min(64)],
    };
    if list.len() != len {
        return Err(field.error(format!("{} items, expected {len}", list.len())));
    }
    Ok(list)
}

/// Sizes per axis of every stage; those of a 2D network are one along z.
pub(super) fn triples(field: &Field<'_>, planar: bool) -> Result<Vec<[usize; 3]>> {
    let axes = if planar { 2 } else { 3 };
    let triple = |f: &Field<'_>| {
        let sizes = numbers(f, axes)?;
        let mut out = [1; 3];
        out[3 - axes..].copy_from_slice(&sizes);
        Ok(out)
    };
    field.items()?.iter().map(triple).collect()
}

/// The sizes of a filter of either dimension.
struct Filter {
    name: String,
    channels: [usize; 2],
    space: [usize; 3],
    planar: bool,
}

impl Filter {
    fn read(weights: &Weights, kind: UnetKind, name: String) -> Result<Self> {
        let Some(shape) = weights.shape(&name) else {
            return Err(Error::model(weights.path(), &name, format!("missing: not a complete {}", kind.class_name())));
        };
        let (channels, space, planar) = match *shape {
            [a, b, d, h, w] => ([a, b], [d, h, w], false),
            [a, b, h, w] => ([a, b], [1, h, w], true),
            _ => {
                let what =
                    format!("shape {shape:?}, expected four or five axes: a convolution of {}", kind.class_name());
                return Err(Error::model(weights.path(), &name, what));
            }
        };
        Ok(Self { name, channels, space, planar })
    }
}
