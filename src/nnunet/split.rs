//! Which cases a network is trained on and which it is validated with (nnU-Net `nnUNetTrainer.do_split`,
//! `generate_crossval_split`).

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::base::json::Json;
use crate::base::mt19937::RandomState;
use crate::error::{Error, Result};
use crate::nnunet::json::{self, Field};

/// The file of custom splits in a data set's folder below `nnUNet_preprocessed`.
pub const FILE: &str = "splits_final.json";

/// nnU-Net's seed of splits.
const SEED: u32 = 12345;

/// Identifiers of cases.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Split {
    /// For training.
    pub train: Vec<String>,
    /// For validation.
    pub val: Vec<String>,
}

/// Which part of a data set validates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fold {
    /// Every case trains, and validates.
    All,
    /// A fold of the cross-validation; beyond its last one a random 20 % validate.
    Number(u32),
}

impl FromStr for Fold {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.parse() {
            // RandomState(12345 + fold) takes 32 bits.
            Ok(n) if n <= u32::MAX - SEED => Ok(Fold::Number(n)),
            _ if s == "all" => Ok(Fold::All),
            _ => Err(Error::usage(format!("fold {s:?}: expected a number such as 0, or all"))),
        }
    }
}

impl fmt::Display for Fold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fold::All => f.write_str("all"),
            Fold::Number(n) => write!(f, "{n}"),
        }
    }
}

/// A five-fold cross-validation of `ids` as given (nnU-Net sorts them), scikit-learn's
/// `KFold(5, shuffle=True, random_state=12345)`.
///
/// # Errors
/// [`Error::Usage`] for fewer than five cases.
pub fn splits(ids: &[String]) -> Result<Vec<Split>> {
    folds(ids, 5)
}

/// As [`splits`] with `n` folds.
///
/// # Errors
/// [`Error::Usage`] for fewer than two folds or fewer cases than folds.
pub fn folds(ids: &[String], n: usize) -> Result<Vec<Split>> {
    if n < 2 || ids.len() < n {
        let what = format!("{} cases cannot be split into {n} folds; train with fold all or write {FILE}", ids.len());
        return Err(Error::usage(what));
    }
    let order = RandomState::new(SEED).permutation(ids.len());
    let mut begin = 0;
    let split = |i: usize| {
        let end = begin + ids.len() / n + usize::from(i < ids.len() % n);
        let mut validates = vec![false; ids.len()];
        order[begin..end].iter().for_each(|&at| validates[at] = true);
        begin = end;
        part(ids, &validates)
    };
    Ok((0..n).map(split).collect())
}

fn part(ids: &[String], validates: &[bool]) -> Split {
    let of = |val: bool| ids.iter().zip(validates).filter(|(_, v)| **v == val).map(|(id, _)| id.clone()).collect();
    Split { train: of(false), val: of(true) }
}

/// The split of `fold` of a data set with the cases `ids`, by nnU-Net's rules: of the splits in the `splits_final.json` of
/// `preprocessed_folder` (`nnUNet_preprocessed/DatasetNNN_Name`), which is written if it is not there.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dataset`] naming what in the file is no split of these cases; [`Error::Usage`] for too few
/// cases.
pub fn fold(preprocessed_folder: &Path, ids: &[String], fold: Fold) -> Result<Split> {
    let mut ids = ids.to_vec();
    ids.sort();
    let number = match fold {
        Fold::All => return Ok(Split { train: ids.clone(), val: ids }),
        Fold::Number(n) => n,
    };
    let path = preprocessed_folder.join(FILE);
    let mut all = if path.try_exists().map_err(|e| Error::io("read", &path, e))? {
        read(&path)?
    } else {
        let new = splits(&ids)?;
        write(&path, &new)?;
        new
    };
    if number as usize >= all.len() {
        let n = all.len();
        tracing::warn!("{}: {n} splits, fold {number} becomes a random 80:20 split", path.display());
        return random(&ids, number);
    }
    let split = all.swap_remove(number as usize);
    let known: BTreeSet<&String> = ids.iter().collect();
    for (key, list) in [("train", &split.train), ("val", &split.val)] {
        let field = format!("[{number}].{key}");
        if let Some(id) = list.iter().find(|id| !known.contains(id)) {
            return Err(Error::dataset(&path, field, format!("{id:?} is no preprocessed case of this data set")));
        }
        if list.is_empty() {
            return Err(Error::dataset(&path, field, "empty, expected at least one case"));
        }
    }
    if let Some(id) = split.val.iter().find(|id| split.train.contains(id)) {
        tracing::warn!("{}: case {id:?} of fold {number} is in train and val", path.display());
    }
    Ok(split)
}

/// A random 80:20 split, seeded by the number of the fold.
fn random(ids: &[String], number: u32) -> Result<Split> {
    let trained = (ids.len() as f64 * 0.8) as usize;
    if trained == 0 {
        return Err(Error::usage(format!("{} cases cannot be split 80:20; train with fold all", ids.len())));
    }
    let chosen = RandomState::new(SEED + number).choice(ids.len(), trained);
    let mut validates = vec![true; ids.len()];
    chosen.iter().for_each(|&i| validates[i] = false);
    let train = chosen.iter().map(|&i| ids[i].clone()).collect();
    Ok(Split { train, ..part(ids, &validates) })
}

/// Reads a `splits_final.json`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dataset`] naming the key that is missing or of the wrong kind.
pub fn read(path: &Path) -> Result<Vec<Split>> {
    let value = json::read_dataset(path)?;
    let ids = |f: Field<'_>| f.items()?.iter().map(|id| id.str().map(str::to_owned)).collect::<Result<Vec<_>>>();
    let split = |s: &Field<'_>| Ok(Split { train: ids(s.need("train")?)?, val: ids(s.need("val")?)? });
    Field::of_dataset(path, &value).items()?.iter().map(split).collect()
}

/// Writes a `splits_final.json`.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, splits: &[Split]) -> Result<()> {
    let split = |s: &Split| Json::object([("train", Json::list(&s.train)), ("val", Json::list(&s.val))]);
    json::write(path, &Json::list(splits.iter().map(split)), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("case_{i:02}")).collect()
    }

    fn numbers(list: &[String]) -> Vec<usize> {
        list.iter().map(|id| id[5..].parse().unwrap()).collect()
    }

    /// Known answers of scikit-learn 1.x and NumPy 2.4.
    #[test]
    fn folds_are_those_of_scikit_learn() {
        let all = splits(&ids(12)).unwrap();
        let val: Vec<Vec<usize>> = all.iter().map(|s| numbers(&s.val)).collect();
        assert_eq!(val, [&[0, 3, 8][..], &[7, 10, 11], &[6, 9], &[1, 4], &[2, 5]]);
        assert_eq!(numbers(&all[2].train), [0, 1, 2, 3, 4, 5, 7, 8, 10, 11]);
        assert_eq!(splits(&ids(4)).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn custom_and_random_splits() {
        let dir = tempfile::tempdir().unwrap();
        let ids = ids(10);
        let first = fold(dir.path(), &ids, Fold::Number(0)).unwrap();
        assert_eq!(first, splits(&ids).unwrap()[0]);
        assert_eq!(read(&dir.path().join(FILE)).unwrap(), splits(&ids).unwrap());

        let random = fold(dir.path(), &ids, Fold::Number(7)).unwrap();
        assert_eq!(numbers(&random.train), [4, 6, 0, 9, 1, 7, 2, 8]);
        assert_eq!(random.val.len(), 2);
        let all = fold(dir.path(), &ids, Fold::All).unwrap();
        assert_eq!((all.train.len(), all.train), (10, all.val));

        for (text, at) in [
            (r#"[{"train": ["case_00"], "val": ["nobody"]}]"#, "[0].val: \"nobody\""),
            (r#"[{"train": [], "val": ["case_00"]}]"#, "[0].train: empty"),
            (r#"[{"train": ["case_00"]}]"#, "[0].val: missing"),
            (r#"[{"train": ["case_00",]}]"#, "JSON: trailing comma"),
        ] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let e = fold(dir.path(), &ids, Fold::Number(0)).unwrap_err();
            assert!(e.to_string().contains(&format!("{FILE}: {at}")) && e.exit_code() == 3, "{e}");
        }
    }

    #[test]
    fn names_of_folds() {
        assert_eq!(["0", "all"].map(|f| f.parse::<Fold>().unwrap()), [Fold::Number(0), Fold::All]);
        assert!(["", "-1", "ALL", "4294967295"].iter().all(|f| f.parse::<Fold>().is_err()));
    }
}
