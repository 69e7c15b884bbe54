//! Compression maps trained by gradient descent, layer by layer, on what the exact model makes of calibration text; the model itself
//! is never changed.
//!
//! The method is that of CSKV (arXiv 2409.10593): each layer's down and up projections, started in closed form, minimise that
//! layer's own loss on its exact keys and values, and what the low-bit quantiser does to latents is part of what is trained
//! ("quantisation-aware"). Beside the paper's loss stands one that counts what attention loses (`problem`). Layers know nothing
//! of each other, so each is a small problem of its own. AdamW with a linear warm-up and a cosine decay (`adam`); the map that is
//! kept is the best one on held-out text, and never one that is worse there than the start.
//!
//! A training lives in a directory (`files`): activations are computed once, and every layer leaves a checkpoint every few
//! seconds. After a kill at any moment the same command goes on, and ends with the very bits that it would have ended with: batches
//! depend on the seed and the step alone (`order`).
//!
//! Cost of a step by attention, on 2 pieces of up to 1024 tokens and 128 queries each: `attention` twice, and the maps and their
//! gradient, about `20 n c r` multiply-adds for `n` tokens, `c` channels and rank `r`. One thread works on one layer. Memory per
//! thread: `16 kv_channels + 8 q_channels` bytes per calibration token, half as much again while a layer is read, and its output
//! projection in f32; disk: `8 kv_channels + 4 q_channels` bytes per token and layer. Llama-3.1-8B with 16384 tokens: 1.2 GB per
//! thread and 13 GB. The demo model (128 and 256 channels): 40 ms per step and layer on one shared core at 2.8 GHz.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::compress::LayerCompression;
use crate::kv::layout::{Profile, Widths};

pub mod adam;
mod attention;
mod checkpoint;
pub mod codec;
mod curve;
pub mod files;
mod map;
mod order;
pub mod problem;
mod tape;

pub use files::{Directory, Identity, Recorder};
pub use map::trained_basis;
pub use problem::Model;

use adam::{Adam, learning_rate};
use checkpoint::State;
use curve::{Curve, Row};
use problem::{Problem, pieces};

/// What is minimised. See [`problem`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    Reconstruction,
    Attention,
}

impl Loss {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Loss::Reconstruction => "reconstruction",
            Loss::Attention => "attention",
        }
    }
}

/// How a training runs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub loss: Loss,
    pub steps: u64,
    /// The highest learning rate, in units of the root mean square of what is trained.
    pub learning_rate: f64,
    /// The same seed makes the same batches.
    pub seed: u64,
}

/// A compressed profile and the maps its training starts from, one per layer.
#[derive(Clone, Debug)]
pub struct Subject {
    pub profile: Profile,
    pub start: Vec<LayerCompression>,
    pub widths: Vec<Widths>,
}

/// The best maps of one layer that training met.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainedLayer {
    pub maps: LayerCompression,
    /// Held-out losses of the start and of these maps; `after <= before`.
    pub before: f64,
    pub after: f64,
    /// Updates until these maps.
    pub step: u64,
}

/// Why a training ends without maps.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("cannot {action} {}: {source}; what was trained so far is kept, and the same command goes on from there", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the training directory {} is in use by another process; wait for it, or give another --train-dir", path.display())]
    Busy { path: PathBuf },
    #[error("the directory {} is not empty and holds no training; give an empty one as --train-dir", path.display())]
    Occupied { path: PathBuf },
    #[error(
        "the training directory {} was begun with another {what} ({there} there, {here} now); repeat the command it was begun with, or give another --train-dir", path.display()
    )]
    Other { path: PathBuf, what: String, there: String, here: String },
    #[error(
        "the training directory {} has a settings.json that cannot be read ({reason}), so that nobody knows what it is of; give another --train-dir", path.display()
    )]
    Unknown { path: PathBuf, reason: String },
    #[error("{} is damaged: {reason}; remove it, and the same command makes it anew", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "layer {layer} made {part} that are not finite (token {token} of a step over calibration text); the checkpoint or the kernels are broken"
    )]
    NotFinite { layer: usize, part: &'static str, token: usize },
    #[error(
        "training {profile} takes at least two calibration texts of {need} tokens or more (of which {longest} are looked at at once), and there are {have}; give more and longer text, or a profile with a smaller window"
    )]
    TooLittleText { profile: String, have: usize, need: usize, longest: usize },
    #[error("the loss of layer {layer} under {profile} is not finite after {step} steps; lower --train-lr")]
    Diverged { profile: String, layer: usize, step: u64 },
    #[error("a tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    #[error("cannot start a thread for training: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Hears of every update: profile, layer, and how many updates it has had.
pub type Progress<'a> = dyn Fn(&str, usize, u64) + Sync + 'a;

/// Rows of a curve, at most about; and of how many one is also a look at what is held out.
const ROWS: u64 = 200;
const ROWS_PER_LOOK: u64 = 5;
/// A checkpoint follows every look at what is held out, and after so long at the latest.
const CHECKPOINT: Duration = Duration::from_secs(5);

/// One layer of one subject.
#[derive(Clone, Copy)]
struct Job<'a> {
    subject: &'a Subject,
    layer: usize,
}

/// Trains every layer of every subject on the activations in `directory`, which are of texts of the lengths `texts`; goes on where an
/// earlier run of the same training stopped. Gives the layers of each subject.
///
/// `threads` layers are trained at once, each by one thread, or by several where there are fewer layers.
///
/// # Errors
/// For the first layer that fails; the others are checkpointed and stop.
pub fn train(
    directory: &Directory,
    model: Model<'_>,
    texts: &[usize],
    subjects: &[Subject],
    settings: &Settings,
    (threads, progress): (usize, &Progress<'_>),
) -> Result<Vec<Vec<TrainedLayer>>, TrainError> {
    for subject in subjects {
        pieces(texts, &subject.profile, settings.loss)?;
    }
    let jobs: Vec<Job<'_>> =
        subjects.iter().flat_map(|subject| (0..subject.start.len()).map(move |layer| Job { subject, layer })).collect();
    let run =
        Run { directory, model, texts, settings, progress, stop: AtomicBool::new(false), curves: Mutex::new(BTreeMap::new()), jobs: &jobs };
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<TrainedLayer>>> = Mutex::new(vec![None; jobs.len()]);
    let workers = threads.clamp(1, jobs.len().max(1));
    // Tensor products spread over the pool they are called in: each worker has its own, so that layers do not wait for each other.
    let pools = (0..workers)
        .map(|_| rayon::ThreadPoolBuilder::new().num_threads((threads / workers).max(1)).build())
        .collect::<Result<Vec<_>, _>>()?;
    let work = |pool: &rayon::ThreadPool| -> Result<(), TrainError> {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&job) = jobs.get(index).filter(|_| !run.stop.load(Ordering::Relaxed)) else { return Ok(()) };
            let trained = pool.install(|| run.layer(index, job)).inspect_err(|_| run.stop.store(true, Ordering::Relaxed))?;
            done.lock().expect("no thread panics with it")[index] = trained;
        }
    };
    let ended: Vec<Result<(), TrainError>> = std::thread::scope(|scope| {
        let handles: Vec<_> = pools.iter().map(|pool| scope.spawn(|| work(pool))).collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    ended.into_iter().collect::<Result<Vec<()>, _>>()?;
    let mut layers = done.into_inner().expect("no thread panicked").into_iter().map(|l| l.expect("every layer ended, or one failed"));
    Ok(subjects.iter().map(|s| layers.by_ref().take(s.start.len()).collect()).collect())
}

/// What all layers share.
struct Run<'a> {
    directory: &'a Directory,
    model: Model<'a>,
    texts: &'a [usize],
    settings: &'a Settings,
    progress: &'a Progress<'a>,
    /// A layer failed.
    stop: AtomicBool,
    jobs: &'a [Job<'a>],
    /// Of layers that ended, by their place in `jobs`.
    curves: Mutex<BTreeMap<usize, Vec<Row>>>,
}

impl Run<'_> {
    /// Trains one layer to its end; `None` where another failed meanwhile.
    fn layer(&self, index: usize, Job { subject, layer }: Job<'_>) -> Result<Option<TrainedLayer>, TrainError> {
        let Subject { profile, start, widths } = subject;
        let (start, s) = (&start[layer], self.settings);
        let cskv = profile.cskv.as_ref().expect("only compressed profiles are trained");
        let path = self.directory.checkpoint(&profile.name, layer);
        let digest = &self.directory.digest;
        let (maps, params) = map::Maps::new(start)?;
        let found = State::read(&path, digest, &params)?;
        let state = match found {
            Some(state) if state.step >= s.steps => {
                (self.progress)(&profile.name, layer, state.step);
                state
            }
            found => {
                let pieces = pieces(self.texts, profile, s.loss)?;
                let activations = self.directory.layer(layer)?;
                let (problem, params) =
                    Problem::new((self.model, layer), &activations, &pieces, (cskv, &widths[layer], start), (s.loss, s.seed))?;
                drop(activations);
                let mut state = match found {
                    Some(state) => state,
                    None => begin(&problem, params)?,
                };
                if !state.start_loss.is_finite() {
                    return Err(TrainError::Diverged { profile: profile.name.clone(), layer, step: 0 });
                }
                let mut saved = Instant::now();
                while state.step < s.steps {
                    if self.stop.load(Ordering::Relaxed) {
                        state.write(&path, digest)?;
                        return Ok(None);
                    }
                    let looked = advance(&mut state, &problem, s).map_err(|e| {
                        e.unwrap_or_else(|| TrainError::Diverged { profile: profile.name.clone(), layer, step: state.step })
                    })?;
                    if looked || saved.elapsed() > CHECKPOINT {
                        state.write(&path, digest)?;
                        saved = Instant::now();
                    }
                    (self.progress)(&profile.name, layer, state.step);
                }
                state
            }
        };
        self.draw(index, state.curve)?;
        // The start itself, not the start through its units and back.
        let maps = if state.best_step == 0 { start.clone() } else { maps.compression(&state.best)? };
        Ok(Some(TrainedLayer { maps, before: state.start_loss, after: state.best_loss, step: state.best_step }))
    }

    /// Writes the curves of the layers that ended.
    fn draw(&self, index: usize, rows: Vec<Row>) -> Result<(), TrainError> {
        // Held while the files are written: one thread at a time.
        let mut curves = self.curves.lock().expect("no thread panics with it");
        curves.insert(index, rows);
        let of = |(&i, rows): (&usize, &'_ Vec<Row>)| (self.jobs[i].subject.profile.name.as_str(), self.jobs[i].layer, rows.clone());
        let lines: Vec<(&str, usize, Vec<Row>)> = curves.iter().map(of).collect();
        let lines: Vec<Curve<'_>> = lines.iter().map(|(profile, layer, rows)| Curve { profile, layer: *layer, rows }).collect();
        let [table, drawing] = self.directory.curves();
        files::replace(&table, curve::table(&lines).as_bytes())?;
        files::replace(&drawing, curve::drawing(&lines, self.settings.steps, self.settings.loss.name()).as_bytes())
    }
}

/// The state before the first update.
fn begin(problem: &Problem, params: Vec<candle_core::Tensor>) -> Result<State, TrainError> {
    let start_loss = problem.held_out(&params)?;
    Ok(State {
        step: 0,
        best: params.clone(),
        adam: Adam::new(params)?,
        best_step: 0,
        best_loss: start_loss,
        start_loss,
        pending: (0.0, 0.0),
        curve: vec![Row { step: 0, learning_rate: 0.0, train: f64::NAN, held_out: start_loss }],
    })
}

/// One update, a row of the curve where it is time, and a look at what is held out where it is time: whether there was one.
///
/// # Errors
/// `None` where the loss or its gradient is not finite.
fn advance(state: &mut State, problem: &Problem, s: &Settings) -> Result<bool, Option<TrainError>> {
    let failed = |e: candle_core::Error| Some(TrainError::Tensor(e));
    let rate = learning_rate(s.learning_rate, state.step, s.steps);
    let slope = problem.slope(&state.adam.params, state.step).map_err(failed)?;
    let norm = state.adam.step(&slope.gradients, state.step, rate).map_err(failed)?;
    if !slope.loss.is_finite() || !norm.is_finite() {
        return Err(None);
    }
    state.step += 1;
    state.pending = (state.pending.0 + slope.loss, state.pending.1 + 1.0);
    let row = s.steps.div_ceil(ROWS);
    let last = state.step == s.steps;
    if !state.step.is_multiple_of(row) && !last {
        return Ok(false);
    }
    let look = state.step.is_multiple_of(row * ROWS_PER_LOOK) || last;
    let mut held_out = f64::NAN;
    if look {
        held_out = problem.held_out(&state.adam.params).map_err(failed)?;
        if !held_out.is_finite() {
            return Err(None);
        }
        if held_out < state.best_loss {
            (state.best_loss, state.best_step, state.best) = (held_out, state.step, state.adam.params.clone());
        }
    }
    let train = state.pending.0 / state.pending.1;
    state.pending = (0.0, 0.0);
    state.curve.push(Row { step: state.step, learning_rate: rate, train, held_out });
    Ok(look)
}
