//! nnU-Net's `checkpoint_*.pth` (`nnUNetTrainer.save_checkpoint` of 2.8.1).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::state::{Logs, Origin, TrainingState};
use super::{Checkpoint, Kept, finite, kept_values, names, parameters};
use crate::error::{Error, Result};
use crate::io::pth::View;
use crate::io::pth::write::{self, Py, Storage, dict};
use crate::io::weights::{Weights, printable};
use crate::nn::{self, GradScaler, Module, Optimizer, PolyLr, Rule};

/// More values than any plan, data set description or log has.
const MAX_VALUES: usize = 4 << 20;

/// nnU-Net's `num_iterations_per_epoch`.
const STEPS_PER_EPOCH: u64 = 250;

/// Writes a checkpoint that nnU-Net goes on with or predicts with: `torch.load` reads it, and its networks load it with
/// `strict=True`. The file appears under its name only when it is complete.
///
/// # Errors
/// As [`super::write()`].
pub fn write_nnunet(
    path: impl AsRef<Path>,
    net: &dyn Module,
    optimizer: &Optimizer,
    state: &TrainingState,
) -> Result<()> {
    let params = parameters(net);
    let mut storages: Vec<Storage<'_>> = Vec::new();
    for &p in &params {
        storages.push(Box::new(|| finite(p, nn::values(p)?)));
    }
    let tensor = |(name, i): (String, usize)| (Py::Str(name), Py::Tensor { storage: i, shape: params[i].shape() });
    let all: Vec<&str> = params.iter().map(|p| p.name()).collect();
    let weights = names::state_dict(&all).into_iter().map(tensor).collect();
    let mut kept = Vec::new();
    for (place, &p) in params.iter().enumerate() {
        let steps = optimizer.steps(p);
        if steps == 0 {
            continue;
        }
        let mut slot = Vec::new();
        if let Rule::Adam { .. } = optimizer.rule() {
            slot.push((Py::Str("step".into()), Py::Tensor { storage: storages.len(), shape: Vec::new() }));
            storages.push(Box::new(move || Ok(vec![steps as f32])));
        }
        for (at, buffer) in optimizer.rule().buffers().iter().enumerate() {
            slot.push((Py::Str((*buffer).into()), Py::Tensor { storage: storages.len(), shape: p.shape() }));
            storages.push(Box::new(move || kept_values(optimizer, p, at)));
        }
        kept.push((Py::Int(place as i64), Py::Dict(slot)));
    }
    let group = group(optimizer.rule(), &state.schedule, state.epoch, params.len());
    let origin = &state.origin;
    let json = |v: &Map<String, Value>| Py::from(&Value::Object(v.clone()));
    let object = dict([
        ("network_weights", Py::OrderedDict(weights)),
        ("optimizer_state", dict([("state", Py::Dict(kept)), ("param_groups", Py::List(vec![group]))])),
        ("grad_scaler_state", state.scaler.map_or(Py::None, scaler_state)),
        ("logging", logging(&state.logs)),
        ("_best_ema", state.best_ema.map_or(Py::None, Py::Float)),
        ("current_epoch", Py::Int(i64::from(state.epoch))),
        (
            "init_args",
            dict([
                ("plans", json(&origin.plans)),
                ("configuration", Py::Str(origin.configuration.clone())),
                ("fold", origin.fold.parse().map_or_else(|_| Py::Str(origin.fold.clone()), Py::Int)),
                ("dataset_json", json(&origin.dataset)),
                ("device", Py::Device("cpu")),
            ]),
        ),
        ("trainer_name", Py::Str(origin.trainer.clone())),
        (
            "inference_allowed_mirroring_axes",
            origin.mirror_axes.as_ref().map_or(Py::None, |a| Py::Tuple(a.iter().map(|a| Py::Int(*a as i64)).collect())),
        ),
    ]);
    write::write(path.as_ref(), &object, &storages)
}

/// The only parameter group, with all that PyTorch 2 keeps in one.
fn group(rule: Rule, schedule: &PolyLr, epoch: u32, params: usize) -> Py {
    let f = Py::Float;
    let off = || Py::Bool(false);
    // The rate of the last epoch, which nnU-Net overwrites when the next one begins.
    let mut items = vec![("lr", f(schedule.at(epoch.saturating_sub(1))))];
    match rule {
        Rule::Sgd { momentum, weight_decay, nesterov } => items.extend([
            ("momentum", f(momentum)),
            ("dampening", Py::Int(0)),
            ("weight_decay", f(weight_decay)),
            ("nesterov", Py::Bool(nesterov)),
            ("maximize", off()),
            ("foreach", Py::None),
            ("differentiable", off()),
            ("fused", Py::None),
        ]),
        Rule::Adam { betas, eps, weight_decay, decoupled } => items.extend([
            ("betas", Py::Tuple(betas.map(f).to_vec())),
            ("eps", f(eps)),
            ("weight_decay", f(weight_decay)),
            ("amsgrad", off()),
            ("maximize", off()),
            ("foreach", Py::None),
            ("capturable", off()),
            ("differentiable", off()),
            ("fused", Py::None),
            ("decoupled_weight_decay", Py::Bool(decoupled)),
        ]),
    }
    items.push(("initial_lr", f(schedule.initial)));
    items.push(("params", Py::List((0..params).map(|i| Py::Int(i as i64)).collect())));
    Py::Dict(items.into_iter().map(|(k, v)| (Py::Str(k.into()), v)).collect())
}

/// `torch.amp.GradScaler.state_dict()`.
fn scaler_state(scaler: GradScaler) -> Py {
    let (growth, backoff, interval) = scaler.rule();
    dict([
        ("scale", Py::Float(scaler.scale())),
        ("growth_factor", Py::Float(growth)),
        ("backoff_factor", Py::Float(backoff)),
        ("growth_interval", Py::Int(interval.into())),
        ("_growth_tracker", Py::Int(scaler.growth_tracker().into())),
    ])
}

fn logging(logs: &Logs) -> Py {
    let list = |v: &[super::Logged]| Py::List(v.iter().map(|v| Py::Float(v.0)).collect());
    dict([
        ("mean_fg_dice", list(&logs.mean_fg_dice)),
        ("ema_fg_dice", list(&logs.ema_fg_dice)),
        ("dice_per_class_or_region", Py::List(logs.dice_per_class_or_region.iter().map(|d| list(d)).collect())),
        ("train_losses", list(&logs.train_losses)),
        ("val_losses", list(&logs.val_losses)),
        ("lrs", list(&logs.lrs)),
        ("epoch_start_timestamps", list(&logs.epoch_start_timestamps)),
        ("epoch_end_timestamps", list(&logs.epoch_end_timestamps)),
    ])
}

/// Opens a checkpoint of nnU-Net.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let bad = |field: &str, what: &str| Error::model(path, field, what);
    let (weights, pickle) = Weights::open_with(path, |root| optimizer_tensors(path, root))?;
    let Some(pickle) = pickle else { return Err(bad("container", "expected a checkpoint of nnU-Net v2 (.pth)")) };
    let root = pickle.root();
    let json = |v: Option<View<'_>>, field: &str| match v {
        None => Ok(Value::Null),
        Some(v) => v.to_json(MAX_VALUES).ok_or_else(|| bad(field, "too large, too deep, or not plain data")),
    };
    let optimizer = root.get("optimizer_state").ok_or_else(|| bad("optimizer_state", "missing"))?;
    let groups = json(optimizer.get("param_groups"), "optimizer_state.param_groups")?;
    let Value::Array(groups) = &groups else { return Err(bad("optimizer_state.param_groups", "expected a list")) };
    let [group] = &groups[..] else {
        return Err(Error::unsupported(format!("{}: {} parameter groups; one is", path.display(), groups.len())));
    };
    let (rule, n) = read_group(path, group)?;
    let mut steps = BTreeMap::new();
    for (place, slot) in optimizer.get("state").and_then(View::entries).into_iter().flatten() {
        // A parameter that never had a gradient, or plain descent, which keeps nothing.
        let plain = slot.get("step").and_then(View::int).and_then(|s| u64::try_from(s).ok());
        if !slot.entries().is_some_and(|mut s| s.any(|(_, v)| v.is_tensor())) {
            continue;
        }
        let place = place.int().and_then(|i| usize::try_from(i).ok()).filter(|i| *i < n);
        let place = place.ok_or_else(|| bad("optimizer_state.state", "a key that is no parameter's number"))?;
        let name = format!("step/{place}");
        let tensor = if weights.shape(&name).is_some() { weights.values(&name)?.first().copied() } else { None };
        steps.insert(place, tensor.map(|v| v as u64).or(plain).unwrap_or(1).max(1));
    }
    let args = root.get("init_args");
    let text = |v: Option<View<'_>>| v.and_then(|v| v.str()).unwrap_or_default().to_string();
    let arg = |key: &str| args.and_then(|a| a.get(key));
    let object = |v: Value| if let Value::Object(map) = v { map } else { Map::new() };
    let epoch = root.get("current_epoch").and_then(View::int).and_then(|e| u32::try_from(e).ok());
    let logs = match json(root.get("logging"), "logging")? {
        Value::Null => Logs::default(),
        v => serde_json::from_value(v).map_err(|e| bad("logging", &printable(&e.to_string())))?,
    };
    let axes = match json(root.get("inference_allowed_mirroring_axes"), "inference_allowed_mirroring_axes")? {
        Value::Null => None,
        v => Some(serde_json::from_value(v).map_err(|_| bad("inference_allowed_mirroring_axes", "expected axes"))?),
    };
    // One that is switched off leaves an empty dictionary. Whatever else it may be, a scaler finds its factor by itself again.
    let scaler: Option<GradScaler> = json(root.get("grad_scaler_state"), "grad_scaler_state")
        .and_then(|v| serde_json::from_value(v).map_err(|_| bad("grad_scaler_state", "not that of a scaler")))
        .ok()
        .filter(GradScaler::is_valid);
    let epoch = epoch.ok_or_else(|| bad("current_epoch", "missing, or no number of an epoch"))?;
    let trainer = text(root.get("trainer_name"));
    let epochs = named_epochs(&trainer).unwrap_or(PolyLr::NNUNET.epochs);
    // SGD does not count its steps.
    let counted = steps.values().copied().max().unwrap_or(0);
    let step = if matches!(rule, Rule::Sgd { .. }) { u64::from(epoch) * STEPS_PER_EPOCH } else { counted };
    let initial = group.get("initial_lr").or(group.get("lr")).and_then(Value::as_f64);
    let state = TrainingState {
        epoch,
        step,
        schedule: PolyLr { initial: initial.unwrap_or(PolyLr::NNUNET.initial), epochs, ..PolyLr::NNUNET },
        scaler,
        best_ema: json(root.get("_best_ema"), "_best_ema")?.as_f64(),
        logs,
        ..TrainingState::new(
            0,
            Origin {
                trainer,
                configuration: text(arg("configuration")),
                fold: arg("fold")
                    .map_or_else(String::new, |f| f.int().map_or_else(|| text(Some(f)), |i| i.to_string())),
                plans: object(json(arg("plans"), "init_args.plans")?),
                dataset: object(json(arg("dataset_json"), "init_args.dataset_json")?),
                mirror_axes: axes,
            },
        )
    };
    // nnU-Net's trainer clips to a norm of 12; no file says so.
    let max_norm = Some(12.0);
    Ok(Checkpoint { weights, state, rule, max_norm, kept: Kept::ByPlace(steps, n), warning: None })
}

/// The number of epochs that a trainer's name tells, as nnU-Net's variants have them: `nnUNetTrainer_250epochs`,
/// `nnUNetTrainer_onlyMirror01_1500ep`.
fn named_epochs(trainer: &str) -> Option<u32> {
    trainer.match_indices("ep").find_map(|(end, _)| {
        let digits = trainer[..end].bytes().rev().take_while(u8::is_ascii_digit).count();
        trainer[end - digits..end].parse().ok().filter(|n| *n > 0)
    })
}

/// What PyTorch's optimizer keeps of each parameter, as `BUFFER/PLACE`.
fn optimizer_tensors<'v>(path: &Path, root: View<'v>) -> Result<Vec<(String, View<'v>)>> {
    let mut out = Vec::new();
    let state = root.get("optimizer_state").and_then(|o| o.get("state"));
    for (place, slot) in state.and_then(View::entries).into_iter().flatten() {
        let place = place.int().unwrap_or(-1);
        for (name, value) in slot.entries().into_iter().flatten() {
            let name = name.str().unwrap_or("?");
            // torch.optim.SGD without momentum keeps a None.
            // Before PyTorch 1.12 Adam counted in plain numbers.
            if name == "step" && value.int().is_some() {
                continue;
            }
            if value.is_tensor() {
                out.push((format!("{name}/{place}"), value));
            } else if value.kind() != "None" {
                let field = format!("optimizer_state.state.{place}.{}", printable(name));
                return Err(Error::model(path, field, format!("{}, expected a tensor", value.kind())));
            }
        }
    }
    Ok(out)
}

/// The rule of a parameter group, and its number of parameters.
fn read_group(path: &Path, group: &Value) -> Result<(Rule, usize)> {
    const FIELD: &str = "optimizer_state.param_groups";
    let bad = |what: String| Error::model(path, FIELD, what);
    let number = |key: &str| group[key].as_f64().ok_or_else(|| bad(format!("{key}: expected a number")));
    let on = |key: &str| group[key].as_bool().unwrap_or(false);
    if on("maximize") || on("amsgrad") || group["dampening"].as_f64().is_some_and(|d| d != 0.0) {
        let what = "an optimizer with maximize, amsgrad or dampening; SGD, Adam and AdamW without are";
        return Err(Error::unsupported(format!("{}: {what}", path.display())));
    }
    let rule = match &group["betas"] {
        Value::Array(betas) => {
            let beta = |i: usize| betas.get(i).and_then(Value::as_f64).ok_or_else(|| bad("betas: expected two".into()));
            let decoupled = on("decoupled_weight_decay");
            Rule::Adam {
                betas: [beta(0)?, beta(1)?],
                eps: number("eps")?,
                weight_decay: number("weight_decay")?,
                decoupled,
            }
        }
        _ => {
            Rule::Sgd { momentum: number("momentum")?, weight_decay: number("weight_decay")?, nesterov: on("nesterov") }
        }
    };
    let params = group["params"].as_array().ok_or_else(|| bad("params: expected a list".into()))?;
    if params.iter().enumerate().any(|(i, p)| p.as_u64() != Some(i as u64)) {
        return Err(bad("params: expected the numbers from 0 on".into()));
    }
    Ok((rule, params.len()))
}
