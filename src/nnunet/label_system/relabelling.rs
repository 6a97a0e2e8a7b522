//! Label maps from one numbering to another.

use bytemuck::Zeroable;

use crate::base::par;
use crate::error::Result;
use crate::io::{LabelData, Segmentation};
use crate::nnunet::preprocess::resample::zeros;

/// Voxels of a piece of work: one that fits the second cache.
const CHUNK: usize = 1 << 18;

/// What becomes of each value of a label map; what is not named becomes background.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relabelling {
    /// Old and new value; an old one stands here once.
    pairs: Vec<(u16, u16)>,
    /// What people call the new values.
    names: Vec<(u16, String)>,
}

impl Relabelling {
    pub(super) fn new(pairs: Vec<(u16, u16)>, names: Vec<(u16, String)>) -> Self {
        Self { pairs, names }
    }

    /// The new values with their names, background left out.
    #[must_use]
    pub fn names(&self) -> &[(u16, String)] {
        &self.names
    }

    /// Gives a label map the new values and names, in bytes if all new values fit. Bound by memory; the same for any number
    /// of threads.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); the label map is then as it was.
    pub fn apply(&self, segmentation: &mut Segmentation) -> Result<()> {
        let narrow = self.names.iter().all(|(value, _)| *value < 256);
        match (&mut segmentation.labels, narrow) {
            (LabelData::U8(v), true) => in_place(v, &self.table::<u8>(1 << 8)),
            (LabelData::U16(v), false) => in_place(v, &self.table::<u16>(1 << 16)),
            (LabelData::U8(v), false) => segmentation.labels = LabelData::U16(mapped(v, &self.table(1 << 8))?),
            (LabelData::U16(v), true) => segmentation.labels = LabelData::U8(mapped(v, &self.table(1 << 16))?),
        }
        segmentation.names.clone_from(&self.names);
        Ok(())
    }

    /// The new value of each of the first `n` old ones.
    fn table<T: TryFrom<u16> + Default + Copy>(&self, n: usize) -> Vec<T> {
        let mut table = vec![T::default(); n];
        for (old, new) in &self.pairs {
            if let (Some(entry), Ok(new)) = (table.get_mut(usize::from(*old)), T::try_from(*new)) {
                *entry = new;
            }
        }
        table
    }
}

fn in_place<T: Copy + Into<usize> + Send + Sync>(labels: &mut [T], table: &[T]) {
    par::chunks_mut(labels, CHUNK, |_, piece| piece.iter_mut().for_each(|l| *l = table[(*l).into()]));
}

fn mapped<A: Copy + Into<usize> + Sync, B: Copy + Zeroable + Send + Sync>(old: &[A], table: &[B]) -> Result<Vec<B>> {
    let mut new = zeros(old.len(), "a label map")?;
    par::chunks_mut(&mut new, CHUNK, |i, piece| {
        piece.iter_mut().zip(&old[i * CHUNK..]).for_each(|(new, old)| *new = table[(*old).into()]);
    });
    Ok(new)
}
