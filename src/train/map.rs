//! The maps of a layer, and the way back through them: four parameters, `down` and `up` of keys and of values. Means and frequencies
//! are fixed.
//!
//! Each parameter is trained in units of its own root mean square at the start, so that one learning rate, which is then relative,
//! serves models and layers whose keys and values differ in size.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use crate::compress::{Basis, FrequencyBasis, FrequencyMap, Group, KeyBasis, KeyMap, LayerBasis, LayerCompression, Projection, Up};

/// Down and up of keys, then of values.
pub(super) const PARAMS: usize = 4;

/// A map without its numbers.
pub(super) enum Form {
    /// A projection of equal blocks: parameters `[groups][width][rank]` and `[groups][rank][width]`.
    Blocks { groups: usize, mean: Vec<f32> },
    /// By frequency: both parameters `[pairs][kv_heads][2]`.
    Pairs { frequencies: Vec<u32>, kv_heads: usize, half: usize },
}

/// `a b`, `a* b` (conjugate) and their like, on real and imaginary part.
fn times([a, b]: [f32; 2], [c, d]: [f32; 2]) -> [f32; 2] {
    [a * c - b * d, a * d + b * c]
}

fn conjugate([a, b]: [f32; 2]) -> [f32; 2] {
    [a, -b]
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

fn add(to: &mut [f32; 2], x: [f32; 2]) {
    to[0] += x[0];
    to[1] += x[1];
}

impl Form {
    fn of(p: &Projection) -> Form {
        Form::Blocks { groups: p.groups.len(), mean: p.mean.clone() }
    }

    fn params(p: &Projection) -> Result<[Tensor; 2]> {
        let (groups, width, rank) = (p.groups.len(), p.channels() / p.groups.len(), p.rank() / p.groups.len());
        let gather =
            |of: fn(&Group) -> &[f32], shape| Tensor::from_vec(p.groups.iter().flat_map(of).copied().collect(), shape, &Device::Cpu);
        Ok([gather(|g| &g.down, (groups, width, rank))?, gather(|g| &g.up, (groups, rank, width))?])
    }

    /// Rows `[n][channels]` in the shape that latents are taken of: `[groups][n][width]` less the mean, or as they are.
    pub(super) fn take(&self, x: &[f32], n: usize) -> Result<Tensor> {
        let channels = x.len() / n;
        match self {
            Form::Blocks { groups, mean } => {
                let centred = x.chunks_exact(channels).flat_map(|row| row.iter().zip(mean).map(|(x, m)| x - m)).collect();
                self.by_group(Tensor::from_vec(centred, (n, channels), &Device::Cpu)?, *groups)
            }
            Form::Pairs { .. } => Tensor::from_slice(x, (n, channels), &Device::Cpu),
        }
    }

    /// `[n][groups * width]` as `[groups][n][width]`.
    fn by_group(&self, x: Tensor, groups: usize) -> Result<Tensor> {
        let n = x.dim(0)?;
        x.reshape((n, groups, ()))?.transpose(0, 1)?.contiguous()
    }

    /// What [`Form::by_group`] undoes.
    fn by_row(x: &Tensor) -> Result<Tensor> {
        x.transpose(0, 1)?.flatten_from(1)
    }

    /// Latents `[n][rank]`, in the order of `compress`.
    pub(super) fn latents(&self, taken: &Tensor, down: &Tensor) -> Result<Tensor> {
        match self {
            Form::Blocks { .. } => Self::by_row(&taken.matmul(down)?),
            Form::Pairs { frequencies, .. } => {
                let (x, down, n) = (numbers(taken)?, numbers(down)?, taken.dim(0)?);
                let mut latents = Vec::with_capacity(n * 2 * frequencies.len());
                self.each(&x, &down, |_, terms| {
                    let mut sum = [0.0; 2];
                    terms.for_each(|(z, d, _)| add(&mut sum, times(d, z)));
                    latents.extend(sum);
                });
                Tensor::from_vec(latents, (n, 2 * frequencies.len()), &Device::Cpu)
            }
        }
    }

    /// The gradient by `down` from that by latents.
    pub(super) fn of_down(&self, taken: &Tensor, of_latents: &Tensor) -> Result<Tensor> {
        match self {
            Form::Blocks { groups, .. } => taken.transpose(1, 2)?.matmul(&self.by_group(of_latents.clone(), *groups)?),
            Form::Pairs { frequencies, kv_heads, .. } => {
                let (x, g) = (numbers(taken)?, numbers(of_latents)?);
                let g = g.as_chunks::<2>().0;
                let mut of_down = vec![[0.0; 2]; frequencies.len() * kv_heads];
                self.each(&x, &vec![0.0; 2 * of_down.len()], |at, terms| {
                    terms.for_each(|(z, _, j)| add(&mut of_down[j], times(conjugate(z), g[at])));
                });
                Tensor::from_vec(of_down.into_flattened(), (frequencies.len(), *kv_heads, 2), &Device::Cpu)
            }
        }
    }

    /// Calls `one` for each latent pair, row by row: its number, and for each KV head the row's complex number at its frequency, the
    /// parameter there and the parameter's place.
    fn each(&self, x: &[f32], param: &[f32], mut one: impl FnMut(usize, &mut dyn Iterator<Item = ([f32; 2], [f32; 2], usize)>)) {
        let Form::Pairs { frequencies, kv_heads, half } = self else { unreachable!("blocks are matrix products") };
        let (param, mut at) = (param.as_chunks::<2>().0, 0);
        for row in x.chunks_exact(2 * half * kv_heads) {
            for (j, &f) in frequencies.iter().enumerate() {
                let z = |h: usize| [row[2 * half * h + f as usize], row[2 * half * h + half + f as usize]];
                one(at, &mut (0..*kv_heads).map(|h| (z(h), param[j * kv_heads + h], j * kv_heads + h)));
                at += 1;
            }
        }
    }

    /// Rows `[n][channels]` from latents `[n][rank]`.
    pub(super) fn rebuild(&self, latents: &Tensor, up: &Tensor) -> Result<Vec<f32>> {
        match self {
            Form::Blocks { groups, mean } => {
                let mut x = numbers(&Self::by_row(&self.by_group(latents.clone(), *groups)?.matmul(up)?)?)?;
                x.chunks_exact_mut(mean.len()).for_each(|row| row.iter_mut().zip(mean).for_each(|(x, m)| *x += m));
                Ok(x)
            }
            Form::Pairs { frequencies, kv_heads, half } => {
                let (latents, up) = (numbers(latents)?, numbers(up)?);
                let up = up.as_chunks::<2>().0;
                let rows = latents.chunks_exact(2 * frequencies.len());
                let mut x = vec![0.0; rows.len() * 2 * half * kv_heads];
                for (row, latents) in x.chunks_exact_mut(2 * half * kv_heads).zip(rows) {
                    for ((j, &f), &c) in frequencies.iter().enumerate().zip(latents.as_chunks::<2>().0) {
                        for (h, &u) in up[j * kv_heads..][..*kv_heads].iter().enumerate() {
                            let [re, im] = times(u, c);
                            row[2 * half * h + f as usize] += re;
                            row[2 * half * h + half + f as usize] += im;
                        }
                    }
                }
                Ok(x)
            }
        }
    }

    /// The gradients by latents and by `up` from that by what [`Form::rebuild`] gives, `[n][channels]`.
    pub(super) fn of_rebuild(&self, latents: &Tensor, up: &Tensor, of_rows: &Tensor) -> Result<[Tensor; 2]> {
        match self {
            Form::Blocks { groups, .. } => {
                let of_rows = self.by_group(of_rows.clone(), *groups)?;
                let latents = self.by_group(latents.clone(), *groups)?;
                let of_latents = Self::by_row(&of_rows.matmul(&up.transpose(1, 2)?)?)?;
                Ok([of_latents, latents.transpose(1, 2)?.matmul(&of_rows)?])
            }
            Form::Pairs { frequencies, .. } => {
                let (rows, weights, seen) = (numbers(of_rows)?, numbers(up)?, numbers(latents)?);
                let seen = seen.as_chunks::<2>().0;
                let mut of_latents = Vec::with_capacity(seen.len());
                let mut of_up = vec![[0.0; 2]; weights.len() / 2];
                self.each(&rows, &weights, |at, terms| {
                    let mut sum = [0.0; 2];
                    terms.for_each(|(g, u, j)| {
                        add(&mut sum, times(conjugate(u), g));
                        add(&mut of_up[j], times(conjugate(seen[at]), g));
                    });
                    of_latents.push(sum);
                });
                let shape = (of_latents.len() / frequencies.len(), 2 * frequencies.len());
                let of_latents = Tensor::from_vec(of_latents.into_flattened(), shape, &Device::Cpu)?;
                Ok([of_latents, Tensor::from_vec(of_up.into_flattened(), up.dims(), &Device::Cpu)?])
            }
        }
    }
}

/// What is fixed of a layer's maps.
pub(super) struct Maps {
    start: LayerCompression,
    /// Of keys and of values.
    pub(super) forms: [Arc<Form>; 2],
    /// Units of the parameters.
    units: [f64; PARAMS],
}

/// Parts that keep nothing as maps of one latent element, or pair, that is zero and stays so, whose gradients are zero: tensors do
/// without empty shapes.
fn padded(start: &LayerCompression) -> LayerCompression {
    let pad = |p: &Projection| {
        let zeros = |g: &Group| vec![0.0; g.channels.len()];
        let one = |(i, g): (usize, &Group)| Group { ranks: i..i + 1, down: zeros(g), up: zeros(g), ..g.clone() };
        match p.rank() {
            0 => Projection { groups: p.groups.iter().enumerate().map(one).collect(), ..p.clone() },
            _ => p.clone(),
        }
    };
    let keys = match &start.keys {
        KeyMap::Channels(p) => KeyMap::Channels(pad(p)),
        KeyMap::Frequencies(map) if map.frequencies.is_empty() => {
            let zeros = vec![[0.0; 2]; map.kv_heads];
            KeyMap::Frequencies(FrequencyMap { frequencies: vec![0], down: zeros.clone(), up: zeros, ..map.clone() })
        }
        map => map.clone(),
    };
    LayerCompression { keys, values: pad(&start.values) }
}

fn rms(x: &[f32]) -> f64 {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    // A map of zeros is measured in ones.
    if mean > 0.0 { mean.sqrt() } else { 1.0 }
}

/// The start with other numbers.
fn with(start: &Projection, down: &[f32], up: &[f32]) -> Projection {
    let mut p = start.clone();
    let (mut down, mut up) = (down, up);
    for g in &mut p.groups {
        let size = g.down.len();
        (g.down, down) = (down[..size].to_vec(), &down[size..]);
        (g.up, up) = (up[..size].to_vec(), &up[size..]);
    }
    p
}

impl Maps {
    /// The maps, and their parameters in their units, as training starts.
    pub(super) fn new(start: &LayerCompression) -> Result<(Maps, Vec<Tensor>)> {
        let padded = padded(start);
        let (keys, key_params) = match &padded.keys {
            KeyMap::Channels(p) => (Form::of(p), Form::params(p)?),
            KeyMap::Frequencies(FrequencyMap { kv_heads, half, frequencies, down, up, .. }) => {
                let tensor = |x: &[[f32; 2]]| Tensor::from_slice(x.as_flattened(), (frequencies.len(), *kv_heads, 2), &Device::Cpu);
                let form = Form::Pairs { frequencies: frequencies.clone(), kv_heads: *kv_heads, half: *half };
                (form, [tensor(down)?, tensor(up)?])
            }
        };
        let mut units = [1.0; PARAMS];
        let mut params = Vec::with_capacity(PARAMS);
        for (unit, x) in units.iter_mut().zip(key_params.into_iter().chain(Form::params(&padded.values)?)) {
            *unit = rms(&numbers(&x)?);
            params.push((x / *unit)?);
        }
        Ok((Maps { start: start.clone(), forms: [Arc::new(keys), Arc::new(Form::of(&padded.values))], units }, params))
    }

    /// The parameters in numbers that count.
    pub(super) fn weights(&self, params: &[Tensor]) -> Result<Vec<Tensor>> {
        params.iter().zip(self.units).map(|(p, unit)| p * unit).collect()
    }

    /// The maps of these parameters.
    pub(super) fn compression(&self, params: &[Tensor]) -> Result<LayerCompression> {
        let weights = self.weights(params)?.iter().map(numbers).collect::<Result<Vec<_>>>()?;
        let pairs = |x: &[f32]| x.as_chunks::<2>().0.to_vec();
        Ok(LayerCompression {
            keys: match &self.start.keys {
                nothing if nothing.rank() == 0 => nothing.clone(),
                KeyMap::Channels(p) => KeyMap::Channels(with(p, &weights[0], &weights[1])),
                KeyMap::Frequencies(map) => {
                    KeyMap::Frequencies(FrequencyMap { down: pairs(&weights[0]), up: pairs(&weights[1]), ..map.clone() })
                }
            },
            values: match self.start.values.rank() {
                0 => self.start.values.clone(),
                _ => with(&self.start.values, &weights[2], &weights[3]),
            },
        })
    }

    /// Whether keys are taken after rope.
    pub(super) fn takes_turned(&self) -> bool {
        matches!(*self.forms[0], Form::Pairs { .. })
    }
}

/// The basis that gives these very maps, at their own ranks only.
pub fn trained_basis(maps: &LayerCompression) -> LayerBasis {
    let of = |p: &Projection| {
        let mut directions = Vec::new();
        for g in &p.groups {
            let rank = g.ranks.len();
            directions.extend((0..rank).flat_map(|r| g.down.iter().skip(r).step_by(rank)));
        }
        let up = p.groups.iter().flat_map(|g| &g.up).copied().collect();
        Basis { mean: p.mean.clone(), groups: p.groups.len(), directions, up: Up::Trained(up) }
    };
    let keys = match &maps.keys {
        KeyMap::Channels(p) => KeyBasis::Channels(of(p)),
        KeyMap::Frequencies(f) => KeyBasis::Frequencies(FrequencyBasis {
            kv_heads: f.kv_heads,
            half: f.half,
            frequencies: f.frequencies.clone(),
            directions: f.down.iter().flat_map(|&[re, im]| [re, -im]).collect(),
            up: Up::Trained(f.up.iter().flatten().copied().collect()),
        }),
    };
    LayerBasis { keys, values: of(&maps.values) }
}
