//! Steps of post-processing and the files they stand in: nnU-Net's `postprocessing.pkl`, which names Python functions, and
//! `postprocessing.json`.

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::pth::write::{Py, dict, pickled};
use crate::io::pth::{View, read_pickle};
use crate::nnunet::json::{self, Field};

/// Where nnU-Net has the only function that its post-processing consists of, and its name.
const MODULE: &str = "nnunetv2.postprocessing.remove_connected_components";
const FUNCTION: &str = "remove_all_but_largest_component_from_segmentation";

/// Steps in one file; nnU-Net takes one for each class and one for all.
const MAX_STEPS: usize = 1 << 16;

/// Of what all but the largest connected component, by faces, edges and corners, becomes background.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Of a label.
    Label(u16),
    /// Of the labels of a region together.
    Region(Vec<u16>),
    /// Of all these labels together: the foreground.
    Foreground(Vec<u16>),
}

impl Step {
    /// The labels whose voxels are looked at together.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        match self {
            Step::Label(label) => std::slice::from_ref(label),
            Step::Region(labels) | Step::Foreground(labels) => labels,
        }
    }

    fn to_json(&self) -> Json {
        match self {
            Step::Label(label) => Json::Int(i64::from(*label)),
            Step::Region(labels) | Step::Foreground(labels) => Json::list(labels.iter().map(|l| usize::from(*l))),
        }
    }

    fn to_python(&self) -> Py {
        let labels = |labels: &[u16]| labels.iter().map(|l| Py::Int(i64::from(*l))).collect();
        match self {
            Step::Label(label) => Py::Int(i64::from(*label)),
            Step::Region(l) => Py::Tuple(labels(l)),
            Step::Foreground(l) => Py::List(labels(l)),
        }
    }

    /// What `labels_or_regions` says: a label, a tuple, or a list of both, which are looked at together.
    fn of(given: &Value) -> Option<Self> {
        fn flat(v: &Value, out: &mut Vec<u16>) -> Option<()> {
            match v {
                Value::Array(items) => items.iter().try_for_each(|i| flat(i, out)),
                v => {
                    out.push(u16::try_from(v.as_u64()?).ok()?);
                    Some(())
                }
            }
        }
        let mut labels = Vec::new();
        flat(given, &mut labels)?;
        match (given, labels.as_slice()) {
            (_, []) => None,
            (Value::Array(_), _) => Some(Step::Foreground(labels)),
            (_, [label, ..]) => Some(Step::Label(*label)),
        }
    }
}

/// Reads the steps of a `.pkl` or `.json` file that nnU-Net or [`write()`] wrote. Nothing in it is executed: the one function
/// that nnU-Net's post-processing consists of is known by its name, any other is refused.
///
/// # Errors
/// [`Error::Io`]; [`Error::Model`] naming the place and what is expected; [`Error::Unsupported`] for another function.
pub fn read(path: &Path) -> Result<Vec<Step>> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("json") => read_json(path),
        Some("pkl") => read_pkl(path),
        _ => Err(Error::usage(format!("{}: expected a file ending in .pkl or .json", path.display()))),
    }
}

fn read_json(path: &Path) -> Result<Vec<Step>> {
    let value = json::read(path)?;
    let root = Field::root(path, &value);
    let (names, kwargs) = (root.need("postprocessing_fns")?.items()?, root.need("postprocessing_kwargs")?.items()?);
    if names.len() != kwargs.len() {
        return Err(root.error(format!("{} functions with {} sets of arguments", names.len(), kwargs.len())));
    }
    let step = |(name, kwargs): (&Field<'_>, &Field<'_>)| {
        if name.str()? != FUNCTION {
            return Err(foreign(path, name.str()?));
        }
        arguments(path, kwargs.value)
    };
    names.iter().zip(&kwargs).map(step).collect()
}

fn read_pkl(path: &Path) -> Result<Vec<Step>> {
    let pickle = read_pickle(path)?;
    let bad = |what: &str| Error::model(path, "pickle", what);
    let pair = pickle.root().items(2).unwrap_or_default();
    let lists: Vec<Vec<View<'_>>> = pair.iter().filter_map(|list| list.items(MAX_STEPS)).collect();
    let [functions, kwargs] = lists.as_slice() else {
        return Err(bad("expected a list of functions and a list of their arguments"));
    };
    if functions.len() != kwargs.len() {
        return Err(bad("as many sets of arguments as functions are expected"));
    }
    // Of all steps together: a pickle may name one list many times.
    let mut left = MAX_STEPS;
    let step = |(function, kwargs): (&View<'_>, &View<'_>)| {
        match function.global() {
            Some((MODULE, FUNCTION)) => {}
            Some((module, name)) => return Err(foreign(path, &format!("{module}.{name}"))),
            None => return Err(bad(&format!("{}, expected a function", function.kind()))),
        }
        let kwargs =
            kwargs.to_json(left).ok_or_else(|| bad("arguments that are no plain data, or too many of them"))?;
        left -= values_in(&kwargs);
        arguments(path, &kwargs)
    };
    functions.iter().zip(kwargs).map(step).collect()
}

/// How many values there are, of which each took one of the budget.
fn values_in(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(values_in).sum::<usize>(),
        Value::Object(entries) => 1 + entries.values().map(values_in).sum::<usize>(),
        _ => 1,
    }
}

fn foreign(path: &Path, name: &str) -> Error {
    let name = crate::io::weights::printable(name);
    Error::unsupported(format!("{}: the function {name}; {FUNCTION} is the one that is known", path.display()))
}

/// The step that the function takes with these arguments.
fn arguments(path: &Path, kwargs: &Value) -> Result<Step> {
    let field = Field::root(path, kwargs);
    for (name, value) in field.entries()? {
        let known = name == "labels_or_regions" || name == "background_label" && value.value.as_u64() == Some(0);
        if !known {
            return Err(value.error("not known; labels_or_regions, and a background_label of 0, are"));
        }
    }
    let given = field.need("labels_or_regions")?;
    Step::of(given.value).ok_or_else(|| given.error("expected a label, a tuple of labels, or a list of them"))
}

/// Writes the steps as `postprocessing.pkl`, which nnU-Net loads: references to its function by name, and its arguments.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, steps: &[Step]) -> Result<()> {
    let functions = steps.iter().map(|_| Py::Global(MODULE, FUNCTION)).collect();
    let kwargs = steps.iter().map(|s| dict([("labels_or_regions", s.to_python())])).collect();
    let bytes = pickled(&Py::Tuple(vec![Py::List(functions), Py::List(kwargs)]))?;
    write_atomically(path, |file| file.write_all(&bytes).map_err(|e| Error::io("write", path, e)))
}

/// `postprocessing_fns` and `postprocessing_kwargs` of `postprocessing.json`.
pub(super) fn to_json(steps: &[Step]) -> [(&'static str, Json); 2] {
    let kwargs = steps.iter().map(|s| Json::object([("labels_or_regions", s.to_json())]));
    [
        ("postprocessing_fns", Json::list(steps.iter().map(|_| FUNCTION))),
        ("postprocessing_kwargs", Json::List(kwargs.collect())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_back_from_their_pickle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("postprocessing.pkl");
        for steps in
            [vec![], vec![Step::Label(3)], vec![Step::Foreground(vec![1, 2, 300]), Step::Label(1), Step::Label(300)]]
        {
            write(&path, &steps).unwrap();
            assert_eq!(read(&path).unwrap(), steps);
        }
        // A tuple that stands alone and a list mean the same.
        write(&path, &[Step::Region(vec![1, 2])]).unwrap();
        assert_eq!(read(&path).unwrap()[0].labels(), [1, 2]);
    }

    #[test]
    fn all_steps_share_one_budget() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("postprocessing.pkl");
        let steps = |n: usize| vec![Step::Foreground((1..=1000).collect()); n];
        write(&path, &steps(60)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 60);
        write(&path, &steps(70)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("too many"));
    }

    #[test]
    fn functions_that_are_not_known_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("postprocessing.pkl");
        let file = |functions: Vec<Py>, kwargs: Vec<Py>| {
            let object = Py::Tuple(vec![Py::List(functions), Py::List(kwargs)]);
            std::fs::write(&path, pickled(&object).unwrap()).unwrap();
            read(&path).unwrap_err()
        };
        let known = Py::Global(MODULE, FUNCTION);
        let e = file(vec![Py::Global("os", "system")], vec![dict([("command", Py::Str("true".into()))])]);
        assert!(e.to_string().contains("os.system") && e.exit_code() == 4, "{e}");
        let e = file(vec![known.clone()], vec![]);
        assert!(e.to_string().contains("as many"), "{e}");
        let e = file(vec![Py::Int(1)], vec![Py::Int(1)]);
        assert!(e.to_string().contains("an integer, expected a function"), "{e}");
        for kwargs in [
            dict([]),
            dict([("labels_or_regions", Py::Str("a".into()))]),
            dict([("labels_or_regions", Py::List(vec![]))]),
            dict([("labels_or_regions", Py::Int(70000))]),
            dict([("labels_or_regions", Py::Int(1)), ("background_label", Py::Int(2))]),
            dict([("labels_or_regions", Py::Int(1)), ("other", Py::Int(0))]),
        ] {
            let e = file(vec![known.clone()], vec![kwargs]);
            assert!(e.to_string().starts_with(&path.display().to_string()), "{e}");
        }
        assert_eq!(read(Path::new("steps.txt")).unwrap_err().exit_code(), 2);
    }
}
