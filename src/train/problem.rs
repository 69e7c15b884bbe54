//! What one layer of one profile is trained on: pieces of calibration text, a part of them held out, and the loss of a map there.
//!
//! Both losses are squared errors over the energy of what is approximated: 0 for maps that lose nothing, 1 for maps that keep
//! nothing (latents of zero), so layers and models compare.
//!
//! - *Reconstruction*, the paper's (CSKV, arXiv 2409.10593): of keys and of values, each by its own energy about the fixed
//!   mean; half their sum. Positions of sinks are left out.
//! - *Attention*: of what attention adds to the residual stream, after the output projection, where every query sees sinks and its
//!   window exactly and everything between through the maps (`attention`). Queries are the exact model's.
//!
//! Latents pass through the serving codec on their way (`codec`); gradients pass through it as if it were not there (the
//! straight-through estimator; Bengio et al., arXiv 1308.3432).

use candle_core::{Device, Result, Tensor, Var};

use crate::compress::{KeyMap, LayerCompression};
use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{Cskv, Profile, Widths};
use crate::model::config::ModelConfig;
use crate::ops::{Heads, Matrix, MatrixData, RopeTable};
use crate::train::attention::{Attended, Exact};
use crate::train::codec::Codec;
use crate::train::files::record;
use crate::train::map::Maps;
use crate::train::order::{shuffled, spread};
use crate::train::tape::{known, known_number};
use crate::train::{Loss, TrainError};

/// Longest stretch of text that is attended to at once; longer texts are cut.
const PIECE: usize = 1024;
/// Queries of a piece that a step looks at, spread over it.
const QUERIES: usize = 128;
/// Pieces a step looks at.
const BATCH: u64 = 2;
/// One piece of so many is held out. Odd, so that texts whose kinds take turns, as the built-in prompts' do, are all held out.
const HELD_OUT: usize = 9;

/// The facts of the model that training needs.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    pub config: &'a ModelConfig,
    /// For the longest text at least.
    pub rope: &'a RopeTable,
    /// The output projection of every layer.
    pub outputs: &'a [Matrix<'a>],
}

/// A stretch of one text, in tokens of all texts together and in positions of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub first: usize,
    pub position: usize,
    pub n: usize,
}

/// The pieces of texts of these lengths that `profile` is trained on, and those held out: all that are longer by a page than what
/// stays exact.
///
/// # Errors
/// Where there are not two.
pub fn pieces(texts: &[usize], profile: &Profile, loss: Loss) -> std::result::Result<[Vec<Piece>; 2], TrainError> {
    let (window, sinks) = profile.cskv.as_ref().map_or((0, 0), |c| (c.window as usize, c.sinks as usize));
    let seen = if loss == Loss::Attention { window } else { 0 };
    let mut all = Vec::new();
    let mut first = 0;
    for &text in texts {
        for position in (0..text).step_by(PIECE) {
            let n = PIECE.min(text - position);
            if n >= sinks.saturating_sub(position) + seen + PAGE_TOKENS as usize {
                all.push(Piece { first: first + position, position, n });
            }
        }
        first += text;
    }
    if all.len() < 2 {
        let need = sinks + seen + PAGE_TOKENS as usize;
        return Err(TrainError::TooLittleText { profile: profile.name.clone(), have: all.len(), need, longest: PIECE });
    }
    let every = HELD_OUT.min(all.len());
    let part = |held: bool| all.iter().enumerate().filter(|(i, _)| (i % every == every - 1) == held).map(|(_, &p)| p).collect();
    Ok([part(false), part(true)])
}

/// The losses of a layer's maps.
pub struct Problem {
    loss: Loss,
    cskv: Cskv,
    codec: Codec,
    heads: Heads,
    seed: u64,
    maps: Maps,
    rope: RopeTable,
    /// `[hidden][q_channels]`.
    output: Tensor,
    train: Vec<Segment>,
    held_out: Vec<Segment>,
    /// What a loss of 1 is: of keys and of values per token, or twice of outputs per query.
    energy: [f64; 2],
}

/// The activations of a piece.
struct Segment {
    position: usize,
    n: usize,
    /// Leading tokens that are sinks.
    sinks: usize,
    /// Keys and values as latents are taken of them.
    taken: [Tensor; 2],
    /// Keys after rope and values, `[n][kv_channels]`; for reconstruction keys before rope where they are taken there.
    exact: [Vec<f32>; 2],
    /// After rope, and what attention over exact keys and values gives them: `[n][q_channels]`. Empty for reconstruction.
    queries: Vec<f32>,
    attended: Vec<f32>,
}

/// A loss, and its gradient by each parameter.
pub struct Slope {
    pub loss: f64,
    pub gradients: Vec<Tensor>,
}

/// A loss, and where it was asked for its gradient by keys and by values as the maps gave them back, `[n][kv_channels]`.
struct Lost {
    loss: f64,
    of_rows: Option<[Tensor; 2]>,
}

impl Problem {
    /// The problem of `layer` for maps that start at `start`; and its parameters there. `activations` are the layer's, of all texts.
    ///
    /// # Errors
    /// Where a tensor operation fails: shapes that do not fit.
    pub fn new(
        (model, layer): (Model<'_>, usize),
        activations: &[f32],
        [train, held_out]: &[Vec<Piece>; 2],
        (cskv, widths, start): (&Cskv, &Widths, &LayerCompression),
        (loss, seed): (Loss, u64),
    ) -> Result<(Problem, Vec<Tensor>)> {
        let c = model.config;
        let (maps, params) = Maps::new(start)?;
        let rotation = match &start.keys {
            KeyMap::Frequencies(map) => map.rotation.clone(),
            KeyMap::Channels(_) => None,
        };
        let mut problem = Problem {
            loss,
            cskv: cskv.clone(),
            codec: Codec::new(cskv, widths, c.kv_heads, rotation),
            heads: Heads { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, scale: c.attention_scale() },
            seed,
            maps,
            rope: model.rope.clone(),
            output: matrix(model.outputs[layer])?,
            train: Vec::new(),
            held_out: Vec::new(),
            energy: [1.0; 2],
        };
        let segments = |pieces: &[Piece]| pieces.iter().map(|p| problem.segment(model, activations, p)).collect::<Result<Vec<_>>>();
        (problem.train, problem.held_out) = (segments(train)?, segments(held_out)?);
        problem.energy = problem.energy(&params)?;
        Ok((problem, params))
    }

    fn segment(&self, model: Model<'_>, activations: &[f32], piece: &Piece) -> Result<Segment> {
        let (kv, q, n) = (model.config.kv_channels(), model.config.q_channels(), piece.n);
        let width = record(model.config);
        let tokens = &activations[piece.first * width..(piece.first + n) * width];
        let column = |from: usize, to: usize| tokens.chunks_exact(width).flat_map(|t| &t[from..to]).copied().collect::<Vec<f32>>();
        let (plain, values) = (column(0, kv), column(kv, 2 * kv));
        let mut keys = plain.clone();
        self.turn(&mut keys, piece.position, self.heads.kv_heads, false);
        let taken_of = if self.maps.takes_turned() { &keys } else { &plain };
        let taken = [self.maps.forms[0].take(taken_of, n)?, self.maps.forms[1].take(&values, n)?];
        let sinks = (self.cskv.sinks as usize).saturating_sub(piece.position);
        if self.loss == Loss::Reconstruction {
            let exact = [taken_of.clone(), values];
            return Ok(Segment { position: piece.position, n, sinks, taken, exact, queries: Vec::new(), attended: Vec::new() });
        }
        let mut queries = column(2 * kv, width);
        self.turn(&mut queries, piece.position, self.heads.heads, false);
        // Exact attention is attention over a past that lost nothing.
        let [k, v] = [&keys, &values].map(|x| Tensor::from_slice(x, (n, kv), &Device::Cpu));
        let (k, v) = (k?, v?);
        let attended = vec![0.0; n * q];
        let mut segment = Segment { position: piece.position, n, sinks, taken, exact: [keys, values], queries, attended };
        let rows: Vec<usize> = self.queries(&segment).collect();
        for rows in rows.chunks(QUERIES) {
            let output = Attended::new(self.exact(&segment), rows, &k, &v)?.output;
            rows.iter().zip(output.chunks_exact(q)).for_each(|(&i, out)| segment.attended[i * q..][..q].copy_from_slice(out));
        }
        Ok(segment)
    }

    /// Turns `x: [n][heads][head_dim]` by rope, the first row to `position`; or takes a gradient `back` through that.
    fn turn(&self, x: &mut [f32], position: usize, heads: usize, back: bool) {
        let half = self.rope.half;
        let tables = self.rope.cos.chunks_exact(half).zip(self.rope.sin.chunks_exact(half)).skip(position);
        let sign = if back { -1.0 } else { 1.0 };
        for (row, (cos, sin)) in x.chunks_exact_mut(heads * 2 * half).zip(tables) {
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                    let sin = sign * sin;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }

    fn exact<'a>(&self, s: &'a Segment) -> Exact<'a> {
        let [keys, values] = &s.exact;
        Exact { heads: self.heads, keys, values, queries: &s.queries, sinks: s.sinks, window: self.cskv.window as usize }
    }

    /// Rows of queries that see something through the maps.
    fn queries(&self, s: &Segment) -> std::ops::Range<usize> {
        s.sinks + self.cskv.window as usize..s.n
    }

    /// What maps that keep nothing lose, at the pieces and queries where nothing is drawn.
    fn energy(&self, params: &[Tensor]) -> Result<[f64; 2]> {
        // Where there is nothing to lose, nothing is lost.
        let or_one = |x: f64| if x > 0.0 { x } else { 1.0 };
        let nothing = params.iter().map(Tensor::zeros_like).collect::<Result<Vec<_>>>()?;
        let weights = self.maps.weights(&nothing)?;
        let (mut sums, mut count) = ([0.0; 2], 0);
        for s in self.train.iter().chain(&self.held_out) {
            let latents = self.latents(s, &weights)?;
            let rows = self.given_back(s, &latents, &weights)?;
            match self.loss {
                Loss::Reconstruction => {
                    count += s.n - s.sinks;
                    for (part, sum) in sums.iter_mut().enumerate() {
                        *sum += squares(&rows[part], &s.exact[part], s.sinks * self.channels());
                    }
                }
                Loss::Attention => {
                    count += 1;
                    let lost = self.attention(s, rows, None, false)?.loss;
                    sums.iter_mut().for_each(|sum| *sum += lost);
                }
            }
        }
        Ok(sums.map(|sum| or_one(sum / count as f64)))
    }

    fn channels(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }

    /// Latents of keys and of values.
    fn latents(&self, s: &Segment, weights: &[Tensor]) -> Result<[Tensor; 2]> {
        let latents = |part: usize| self.maps.forms[part].latents(&s.taken[part], &weights[2 * part]);
        Ok([latents(0)?, latents(1)?])
    }

    /// Latents as their reader sees them.
    fn seen(&self, s: &Segment, latents: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        let through = |codec: fn(&Codec, &mut [f32], usize), latents: &Tensor| {
            let mut seen = latents.flatten_all()?.to_vec1::<f32>()?;
            codec(&self.codec, &mut seen, s.position);
            Tensor::from_vec(seen, latents.dims(), &Device::Cpu)
        };
        Ok([through(Codec::keys, &latents[0])?, through(Codec::values, &latents[1])?])
    }

    /// Keys and values as the maps give them back, `[n][kv_channels]`: keys after rope for attention; for reconstruction as they
    /// were taken.
    fn given_back(&self, s: &Segment, seen: &[Tensor; 2], weights: &[Tensor]) -> Result<[Vec<f32>; 2]> {
        let rows = |part: usize| self.maps.forms[part].rebuild(&seen[part], &weights[2 * part + 1]);
        let mut rows = [rows(0)?, rows(1)?];
        if self.turns_back() {
            self.turn(&mut rows[0], s.position, self.heads.kv_heads, false);
        }
        Ok(rows)
    }

    /// Whether keys are turned once they are rebuilt.
    fn turns_back(&self) -> bool {
        self.loss == Loss::Attention && !self.maps.takes_turned()
    }

    fn lost(&self, s: &Segment, rows: [Vec<f32>; 2], drawn: Option<u64>, slope: bool) -> Result<Lost> {
        match self.loss {
            Loss::Reconstruction => self.reconstruction(s, rows, slope),
            Loss::Attention => self.attention(s, rows, drawn, slope),
        }
    }

    fn reconstruction(&self, s: &Segment, rows: [Vec<f32>; 2], slope: bool) -> Result<Lost> {
        let (channels, skip) = (self.channels(), s.sinks * self.channels());
        let scales = self.energy.map(|energy| 1.0 / (2.0 * energy * (s.n - s.sinks) as f64));
        let loss = (0..2).map(|part| squares(&rows[part], &s.exact[part], skip) * scales[part]).sum();
        if !slope {
            return Ok(Lost { loss, of_rows: None });
        }
        let mut rows = rows;
        for (part, rows) in rows.iter_mut().enumerate() {
            let twice = 2.0 * scales[part] as f32;
            rows[..skip].fill(0.0);
            rows[skip..].iter_mut().zip(&s.exact[part][skip..]).for_each(|(x, t)| *x = (*x - t) * twice);
        }
        let [keys, values] = rows.map(|x| Tensor::from_vec(x, (s.n, channels), &Device::Cpu));
        Ok(Lost { loss, of_rows: Some([keys?, values?]) })
    }

    /// Looks at queries that are `drawn`, or at the same ones every time.
    fn attention(&self, s: &Segment, rows: [Vec<f32>; 2], drawn: Option<u64>, slope: bool) -> Result<Lost> {
        let range = self.queries(s);
        let looked = spread(range.clone(), QUERIES.min(range.len()), drawn.map(|index| (self.seed, index)));
        let [keys, values] = rows.map(|x| Tensor::from_vec(x, (s.n, self.channels()), &Device::Cpu));
        let attended = Attended::new(self.exact(s), &looked, &keys?, &values?)?;
        let q = self.heads.heads * self.heads.head_dim;
        let lost: Vec<f32> = looked
            .iter()
            .zip(attended.output.chunks_exact(q))
            .flat_map(|(&i, out)| out.iter().zip(&s.attended[i * q..][..q]).map(|(x, y)| x - y))
            .collect();
        let lost = Tensor::from_vec(lost, (looked.len(), q), &Device::Cpu)?.matmul(&self.output.t()?)?;
        let scale = 1.0 / (self.energy[0] * looked.len() as f64);
        let loss = lost.flatten_all()?.to_vec1::<f32>()?.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() * scale;
        if !slope {
            return Ok(Lost { loss, of_rows: None });
        }
        let mut of_output = lost.matmul(&self.output)?.flatten_all()?.to_vec1::<f32>()?;
        of_output.iter_mut().for_each(|x| *x *= 2.0 * scale as f32);
        let [keys, values] = attended.gradients(&of_output)?;
        if !self.turns_back() {
            return Ok(Lost { loss, of_rows: Some([keys, values]) });
        }
        let mut plain = keys.flatten_all()?.to_vec1::<f32>()?;
        self.turn(&mut plain, s.position, self.heads.kv_heads, true);
        Ok(Lost { loss, of_rows: Some([Tensor::from_vec(plain, keys.dims(), &Device::Cpu)?, values]) })
    }

    /// The loss at `params` on the pieces of step `step`, and its gradient.
    ///
    /// # Errors
    /// Where a tensor operation fails.
    pub fn slope(&self, params: &[Tensor], step: u64) -> Result<Slope> {
        let vars = params.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let weights = self.maps.weights(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let mut loss = 0.0;
        let mut terms = Vec::new();
        for index in step * BATCH..(step + 1) * BATCH {
            let s = &self.train[shuffled(self.seed, index, self.train.len())];
            let fixed: Vec<Tensor> = weights.iter().map(Tensor::detach).collect();
            let latents = self.latents(s, &fixed)?;
            let seen = self.seen(s, &latents)?;
            let lost = self.lost(s, self.given_back(s, &seen, &fixed)?, Some(index), true)?;
            loss += lost.loss;
            for (part, of_rows) in lost.of_rows.into_iter().flatten().enumerate() {
                let (form, down, up) = (&self.maps.forms[part], &weights[2 * part], &weights[2 * part + 1]);
                let (of_down, taken) = (form.clone(), s.taken[part].clone());
                let latents = known(down, &latents[part], move |of_latents| of_down.of_down(&taken, of_latents))?;
                // Straight through the codec.
                let through = known(&latents, &seen[part], |of_seen| Ok(of_seen.clone()))?;
                let (form, seen, fixed) = (form.clone(), seen[part].clone(), fixed[2 * part + 1].clone());
                let back = move || form.of_rebuild(&seen, &fixed, &of_rows);
                // Each part has half of the loss, and all of its own gradient.
                terms.push(known_number([&through, up], lost.loss / 2.0, back)?);
            }
        }
        let mean = (Tensor::stack(&terms, 0)?.sum_all()? / BATCH as f64)?;
        let store = mean.backward()?;
        let gradients = vars.iter().map(|v| store.get(v).cloned().map_or_else(|| v.zeros_like(), Ok)).collect::<Result<_>>()?;
        Ok(Slope { loss: loss / BATCH as f64, gradients })
    }

    /// The loss at `params` on everything that is held out, at the same queries every time.
    ///
    /// # Errors
    /// Where a tensor operation fails.
    pub fn held_out(&self, params: &[Tensor]) -> Result<f64> {
        let weights = self.maps.weights(params)?;
        let one = |s: &Segment| {
            let latents = self.latents(s, &weights)?;
            let seen = self.seen(s, &latents)?;
            Ok(self.lost(s, self.given_back(s, &seen, &weights)?, None, false)?.loss)
        };
        let losses = self.held_out.iter().map(one).collect::<Result<Vec<_>>>()?;
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    }

    /// The maps of these parameters.
    ///
    /// # Errors
    /// Where a tensor operation fails.
    pub fn compression(&self, params: &[Tensor]) -> Result<LayerCompression> {
        self.maps.compression(params)
    }
}

/// Sum of the squared differences of elements `skip` on.
fn squares(a: &[f32], b: &[f32], skip: usize) -> f64 {
    a[skip..].iter().zip(&b[skip..]).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

fn matrix(m: Matrix<'_>) -> Result<Tensor> {
    let data = match m.data {
        MatrixData::F32(w) => w.to_vec(),
        MatrixData::Bf16(w) => w.iter().map(|x| x.to_f32()).collect(),
    };
    Tensor::from_vec(data, (m.out_features, m.in_features), &Device::Cpu)
}
