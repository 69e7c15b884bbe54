//! The state of one layer's training as a file: a safetensors file, so that any reader of that format opens it.
//!
//! ```text
//! __metadata__   "strait.training": BLAKE3 of the directory's settings
//! params.i, first.i, second.i, best.i   f32: the parameters, their moments, and the best parameters so far
//! counts         u64 [2]: updates made, and updates of the best parameters
//! scalars        f64 [4]: held-out loss at the start, the least so far; sum and number of losses since the last row of the curve
//! curve          f64 [rows][4]: step, learning rate, training loss, held-out loss; NaN where there is none
//! digest         u8 [32]: BLAKE3 of all other tensors, by name, with their names, types and shapes
//! ```
//!
//! A changed bit would not show in anything but worse maps, so a file that is not what was written is refused.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::train::TrainError;
use crate::train::adam::Adam;
use crate::train::curve::Row;
use crate::train::files::replace;

const SETTINGS: &str = "strait.training";
const DIGEST: &str = "digest";

/// Where a layer's training stands.
#[derive(Clone)]
pub(super) struct State {
    /// Updates made.
    pub(super) step: u64,
    pub(super) adam: Adam,
    pub(super) best: Vec<Tensor>,
    /// The update count of `best`.
    pub(super) best_step: u64,
    pub(super) best_loss: f64,
    pub(super) start_loss: f64,
    /// Sum and number of losses since the last row.
    pub(super) pending: (f64, f64),
    pub(super) curve: Vec<Row>,
}

const LISTS: [&str; 4] = ["params", "first", "second", "best"];

impl State {
    /// Writes the state, whole or not at all.
    ///
    /// # Errors
    /// Where the disk refuses it.
    pub(super) fn write(&self, path: &Path, settings: &str) -> Result<(), TrainError> {
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (name, list) in LISTS.iter().zip([&self.adam.params, &self.adam.first, &self.adam.second, &self.best]) {
            for (i, t) in list.iter().enumerate() {
                let bytes = t.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
                tensors.push((format!("{name}.{i}"), Dtype::F32, t.dims().to_vec(), bytes));
            }
        }
        let doubles = |x: &[f64]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let scalars = [self.start_loss, self.best_loss, self.pending.0, self.pending.1];
        let counts = [self.step, self.best_step].iter().flat_map(|n| n.to_le_bytes()).collect();
        tensors.push(("counts".into(), Dtype::U64, vec![2], counts));
        tensors.push(("scalars".into(), Dtype::F64, vec![scalars.len()], doubles(&scalars)));
        let curve: Vec<f64> = self.curve.iter().flat_map(|r| [r.step as f64, r.learning_rate, r.train, r.held_out]).collect();
        tensors.push(("curve".into(), Dtype::F64, vec![self.curve.len(), 4], doubles(&curve)));
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let digest = content(tensors.iter().map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, &shape[..], &bytes[..])));
        tensors.push((DIGEST.into(), Dtype::U8, vec![digest.len()], digest.to_vec()));
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes).expect("the bytes are those of the shape");
            (name.as_str(), view)
        });
        // One entry: the order of more would be that of a hash map, and the bytes another every time.
        let metadata = HashMap::from([(SETTINGS.to_owned(), settings.to_owned())]);
        let bytes = safetensors::serialize(views, Some(metadata)).expect("names and shapes are our own");
        replace(path, &bytes)
    }

    /// The state at `path`, if there is one; `like` are parameters of the layer's shapes.
    ///
    /// # Errors
    /// Where the file cannot be read, is not what was written, or is of another training or shape.
    pub(super) fn read(path: &Path, settings: &str, like: &[Tensor]) -> Result<Option<State>, TrainError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TrainError::Io { action: "read", path: path.to_owned(), source }),
        };
        let damaged = |reason: String| TrainError::Damaged { path: path.to_owned(), reason };
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let metadata = metadata.metadata().clone().unwrap_or_default();
        if metadata.get(SETTINGS).map(String::as_str) != Some(settings) {
            return Err(damaged("it belongs to another training".into()));
        }
        let mut all = file.tensors();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let written = all.iter().position(|(name, _)| name == DIGEST).map(|at| all.remove(at).1);
        let found = content(all.iter().map(|(name, t)| (name.as_str(), t.dtype(), t.shape(), t.data())));
        if written.is_none_or(|written| written.data() != found) {
            return Err(damaged("its numbers are not those that were written".into()));
        }
        let tensor = |name: &str, dtype: Dtype| match file.tensor(name) {
            Ok(t) if t.dtype() == dtype => Ok(t),
            _ => Err(damaged(format!("it has no {name}"))),
        };
        let list = |name: &str| {
            let one = |(i, like): (usize, &Tensor)| {
                let name = format!("{name}.{i}");
                let found = tensor(&name, Dtype::F32)?;
                if found.shape() != like.dims() {
                    return Err(damaged(format!("{name} has the shape {:?}, not {:?}", found.shape(), like.dims())));
                }
                let numbers = found.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                Ok(Tensor::from_vec(numbers, like.dims(), &Device::Cpu)?)
            };
            like.iter().enumerate().map(one).collect::<Result<Vec<_>, TrainError>>()
        };
        let doubles = |name: &str| -> Result<Vec<f64>, TrainError> {
            Ok(tensor(name, Dtype::F64)?.data().as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect())
        };
        let [step, best_step] = tensor("counts", Dtype::U64)?.data().as_chunks::<8>().0[..] else {
            return Err(damaged("it has no counts".into()));
        };
        let [start_loss, best_loss, sum, n] = doubles("scalars")?[..] else { return Err(damaged("it has no scalars".into())) };
        let rows = doubles("curve")?.as_chunks::<4>().0.to_vec();
        Ok(Some(State {
            step: u64::from_le_bytes(step),
            adam: Adam { params: list("params")?, first: list("first")?, second: list("second")? },
            best: list("best")?,
            best_step: u64::from_le_bytes(best_step),
            best_loss,
            start_loss,
            pending: (sum, n),
            curve: rows
                .into_iter()
                .map(|[step, learning_rate, train, held_out]| Row { step: step as u64, learning_rate, train, held_out })
                .collect(),
        }))
    }
}

/// BLAKE3 of tensors in the order they come.
fn content<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for (name, dtype, shape, bytes) in tensors {
        // The text is as long as its own words say, and the bytes are as long as type and shape do.
        hasher.update(format!("{name:?} {dtype:?} {shape:?}\n").as_bytes()).update(bytes);
    }
    *hasher.finalize().as_bytes()
}
