//! What an adapter that was trained on changed weights adds on the weights as they are served.
//!
//! PiSSA (Meng et al. 2024) and SORSA take the leading singular triplets out of the base before training, OLoRA the leading columns
//! of its QR decomposition; LoRA-GA and CorDA take out a product that only the initial adapter or the residual base still knows.
//! With `W_r = W - P` trained to `W_r + s B A`, the difference on the served `W` is `s B A - P`: of twice the rank, exact.
//!
//! Both halves are as large as the leading part of `W`, and their difference is small. It is formed in f64 and factored anew, so
//! that rounding the factors costs a share of the difference and not of `W`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use faer::{Mat, MatRef};

use crate::adapters::left::{self, Left};
use crate::adapters::pack::base_weight;
use crate::adapters::spectrum::{self, Dense, Triplets};
use crate::adapters::{AdapterError, BaseChoice, Format, Module, Parsed, Place, Reader, TrainedOn, peft, sorsa};
use crate::files::replace_file;
use crate::model::checkpoint::{Checkpoint, CheckpointError, Unmapped};

/// Singular values below this share of the largest that the two halves of a difference have are rounding.
const NULL: f64 = 2e-7;

/// Leading singular triplets of the base, by module: computed once and kept on disk; in memory, up to 256 MiB of them, where
/// there is no folder for that.
pub struct Spectra {
    dir: Option<PathBuf>,
    /// The latest used last.
    known: Mutex<Vec<(Place, Arc<Triplets>)>>,
}

/// Bytes of triplets in memory at most.
const KEPT: usize = 256 << 20;

impl Spectra {
    /// Kept under `dir`, in a folder of the base's digest; in memory alone without one.
    ///
    /// # Errors
    /// As [`Checkpoint::digest`].
    pub fn new(dir: Option<&Path>, base: &Checkpoint) -> Result<Spectra, CheckpointError> {
        let digest: String = base.digest()?[..8].iter().map(|b| format!("{b:02x}")).collect();
        Ok(Spectra { dir: dir.map(|d| d.join(digest)), known: Mutex::default() })
    }

    /// The `r` leading triplets of the base's weights at `place`; perhaps more.
    ///
    /// # Errors
    /// Where the weights have no decomposition, which finite ones have.
    pub fn top(&self, base: &Checkpoint, place: Place, r: usize) -> Result<Arc<Triplets>, AdapterError> {
        // One computation at a time: two would take each other's cores.
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (rows, cols) = place.shape(&base.config);
        let enough = |t: &Triplets| t.rows == rows && t.cols == cols && t.s.len() >= r.min(rows).min(cols);
        if let Some(at) = known.iter().position(|(p, t)| *p == place && enough(t)) {
            let found = known.remove(at);
            let triplets = found.1.clone();
            known.push(found);
            return Ok(triplets);
        }
        let file = self.dir.as_ref().map(|d| d.join(format!("{}.top", place.path())));
        let stored = file.as_ref().and_then(|f| kept(f)).and_then(|bytes| read_triplets(&bytes));
        let mut on_disk = true;
        let found = match stored.filter(enough) {
            Some(stored) => stored,
            None => {
                let weight = base_weight(base, place);
                let found = spectrum::top(Dense { rows, cols, data: &weight }, r).map_err(|e| at(place, &e))?;
                on_disk = file.as_ref().is_some_and(|file| keep(file, &triplet_bytes(&found)));
                found
            }
        };
        let found = Arc::new(found);
        if !on_disk {
            let size = |t: &Triplets| 8 * (t.u.len() + t.s.len() + t.v.len());
            known.retain(|(p, _)| *p != place);
            known.push((place, found.clone()));
            while known.len() > 1 && known.iter().map(|(_, t)| size(t)).sum::<usize>() > KEPT {
                known.remove(0);
            }
        }
        Ok(found)
    }

    /// All left singular vectors of the base's weights at `place`.
    ///
    /// # Errors
    /// As [`Spectra::top`].
    pub fn left(&self, base: &Checkpoint, place: Place) -> Result<Left, AdapterError> {
        let (rows, cols) = place.shape(&base.config);
        let file = self.dir.as_ref().map(|d| d.join(format!("{}.left", place.path())));
        let stored = file.as_ref().and_then(|f| kept(f)).and_then(|bytes| Left::from_bytes(&bytes).ok());
        if let Some(stored) = stored.filter(|l| l.rows == rows) {
            return Ok(stored);
        }
        let weight = base_weight(base, place);
        let found = left::left(Dense { rows, cols, data: &weight }).map_err(|e| at(place, &e))?;
        if let Some(file) = &file {
            keep(file, &found.to_bytes());
        }
        Ok(found)
    }
}

const MAGIC: [u8; 8] = *b"TOPSVD\x00\x01";

fn triplet_bytes(t: &Triplets) -> Vec<u8> {
    let sizes = [t.rows, t.cols, t.s.len()].into_iter().flat_map(|n| (n as u64).to_le_bytes());
    let numbers = t.u.iter().chain(&t.s).chain(&t.v).flat_map(|v| v.to_le_bytes());
    MAGIC.into_iter().chain(sizes).chain(numbers).collect()
}

fn read_triplets(bytes: &[u8]) -> Option<Triplets> {
    let (head, numbers) = bytes.split_at_checked(32)?;
    let size = |i: usize| usize::try_from(u64::from_le_bytes(head[8 * i..][..8].try_into().ok()?)).ok();
    let (rows, cols, n) = (size(1)?, size(2)?, size(3)?);
    let count = rows.checked_add(cols)?.checked_add(1)?.checked_mul(n)?;
    if head[..8] != MAGIC || Some(numbers.len()) != count.checked_mul(8) {
        return None;
    }
    let mut all = numbers.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("chunks of eight")));
    let mut take = |n: usize| all.by_ref().take(n).collect::<Vec<f64>>();
    let (u, s, v) = (take(rows * n), take(n), take(cols * n));
    [&u, &s, &v].iter().all(|x| x.iter().all(|v| v.is_finite())).then_some(Triplets { rows, cols, u, s, v })
}

/// What [`keep`] wrote, if that is there; what a disk changed is computed anew.
fn kept(file: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(file).ok()?;
    let digest = bytes.split_off(bytes.len().checked_sub(blake3::OUT_LEN)?);
    (blake3::hash(&bytes) == digest[..]).then_some(bytes)
}

/// Keeps bytes and their digest for the next time, whole or not at all; whether that was possible. Where not, it costs time alone.
fn keep(file: &Path, bytes: &[u8]) -> bool {
    let write = || -> std::io::Result<()> {
        let dir = file.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir)?;
        // Others may write the same at once, on other machines too: the draft's name is taken by one alone.
        replace_file(file, |w| w.write_all(bytes).and_then(|()| w.write_all(blake3::hash(bytes).as_bytes())))
    };
    let written = write();
    if let Err(error) = &written {
        tracing::debug!(file = %file.display(), %error, "a decomposition could not be kept");
    }
    written.is_ok()
}

fn at(place: Place, error: &spectrum::Error) -> AdapterError {
    AdapterError::Refused { reason: format!("{}: {error}", place.path()) }
}

/// Makes the factors of `parsed` differences on the served base. What else than its own files shaped them comes back, as a digest.
///
/// # Errors
/// Where the base they were trained on is not the served one, cannot be had, or is not the one that was named.
pub fn onto_served(parsed: &mut Parsed, choice: &BaseChoice, reader: &Reader<'_>) -> Result<[u8; 32], AdapterError> {
    let mut other = [0; 32];
    let settled = match (choice, parsed.trained_on) {
        (BaseChoice::Original, _) | (BaseChoice::Auto, TrainedOn::Base) | (_, TrainedOn::WithoutScaledLeading) => BTreeSet::new(),
        _ => with_own_base(parsed, reader.base)?,
    };
    match choice {
        BaseChoice::Auto | BaseChoice::Pissa => {
            let pissa = *choice == BaseChoice::Pissa;
            match parsed.trained_on {
                TrainedOn::WithoutQr | TrainedOn::WithoutScaledLeading if pissa => {
                    return Err(AdapterError::Refused {
                        reason: "it says itself what it was trained on, and that is no PiSSA; leave base out".into(),
                    });
                }
                TrainedOn::Base if pissa => without_leading(parsed, &settled, reader)?,
                TrainedOn::Base if matches!(parsed.format, Format::Lora | Format::Rslora) => not_residual(parsed, reader.base)?,
                TrainedOn::Base => {}
                TrainedOn::WithoutLeading | TrainedOn::WithoutScaledLeading => without_leading(parsed, &settled, reader)?,
                TrainedOn::WithoutQr => without_qr(parsed, &settled, reader.base)?,
            }
        }
        _ if parsed.format == Format::Sorsa => {
            return Err(AdapterError::Refused { reason: "a SORSA checkpoint knows its base; leave base out".into() });
        }
        BaseChoice::Original => {}
        BaseChoice::Residual(path) => other = from_residual(parsed, &settled, path, reader)?,
        BaseChoice::Initial(path) => other = from_initial(parsed, &settled, path, reader)?,
    }
    parsed.trained_on = TrainedOn::Base;
    Ok(other)
}

/// `up down - sign * (left right)`, factored anew: `left: [out][k]`, `right: [k][in]`.
fn add(
    module: &mut Module,
    (place, shape): (Place, (usize, usize)),
    sign: f64,
    (left, right): (&[f64], &[f64]),
) -> Result<(), AdapterError> {
    let (out, inputs) = shape;
    let (r, k) = (module.rank, left.len() / out);
    let mut up = vec![0.0; out * (r + k)];
    for o in 0..out {
        for j in 0..r {
            up[o * (r + k) + j] = f64::from(module.up[o * r + j]);
        }
        for j in 0..k {
            up[o * (r + k) + r + j] = sign * left[o * k + j];
        }
    }
    let down: Vec<f64> = module.down.iter().map(|v| f64::from(*v)).chain(right.iter().copied()).collect();
    // How large each half is bounds what rounding may leave of their difference.
    let size = left.chunks_exact(k.max(1)).map(|row| row.iter().map(|v| v * v).sum::<f64>()).sum::<f64>().sqrt()
        * right.chunks_exact(inputs).map(|row| row.iter().map(|v| v * v).sum::<f64>().sqrt()).fold(0.0, f64::max);
    let mut found = spectrum::refactor(&up, &down, out, r + k, inputs).map_err(|e| self::at(place, &e))?;
    found.truncate(found.s.iter().take_while(|s| **s > NULL * size).count().max(1));
    let (up, down) = found.balanced();
    module.rank = found.s.len();
    module.up = up.iter().map(|v| *v as f32).collect();
    module.down = down.iter().map(|v| *v as f32).collect();
    Ok(())
}

/// The modules whose factors began as a part of the base, with what they are. PEFT's embeddings begin at zero whatever
/// `init_lora_weights` says, so nothing was taken out of theirs; `settled` are those of [`with_own_base`].
fn begun<'a>(parsed: &'a mut Parsed, settled: &'a BTreeSet<Place>) -> impl Iterator<Item = (Place, &'a mut Module)> {
    let begun = |p: &Place, m: &Module| m.rank > 0 && *p != Place::Embed && !settled.contains(p);
    parsed.modules.iter_mut().filter(move |(p, m)| begun(p, m)).map(|(p, m)| (*p, m))
}

/// The modules beside whose factors the file has the weights that they belong on, as PEFT saves a targeted output head: what the
/// initialisation left of it. Where that is the served base less a product of their rank, the product joins the factors; otherwise
/// the weights stay theirs.
fn with_own_base(parsed: &mut Parsed, base: &Checkpoint) -> Result<BTreeSet<Place>, AdapterError> {
    let mut settled = BTreeSet::new();
    if base.config.tied && parsed.modules.get(&Place::Head).is_some_and(|m| m.rank > 0) {
        return Err(AdapterError::NotServed {
            what: "its initialisation took a product out of the output head, which is this base's embedding, so that lost it, too".into(),
            mend: "train it with lm_head left out of target_modules".into(),
        });
    }
    for (place, module) in begun(parsed, &BTreeSet::new()) {
        let Some(left) = module.weight.take() else { continue };
        let own = base_weight(base, place);
        if left != own && add_difference(module, (place, place.shape(&base.config)), &left, &own)?.is_some() {
            module.weight = Some(left);
        }
        settled.insert(place);
    }
    Ok(settled)
}

/// Adds to the factors what weights have that the served base's `own` have not, if that is a product of the module's rank, as far as
/// rounding goes; otherwise says how much more it is, in parts of `own`.
fn add_difference(
    module: &mut Module,
    (place, shape): (Place, (usize, usize)),
    left: &[f32],
    own: &[f32],
) -> Result<Option<f64>, AdapterError> {
    let difference: Vec<f32> = left.iter().zip(own).map(|(a, b)| a - b).collect();
    let dense = Dense { rows: shape.0, cols: shape.1, data: &difference };
    let found = spectrum::top(dense, module.rank).map_err(|e| at(place, &e))?;
    let square = |v: &[f32]| v.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    let rest = square(&difference) - found.s.iter().map(|s| s * s).sum::<f64>();
    // Weights in bf16 are rounded by up to 0.2 % of themselves.
    if rest > 1e-4 * square(left) {
        return Ok(Some((rest / square(own)).sqrt()));
    }
    let (up, down) = found.balanced();
    add(module, (place, shape), 1.0, (&up, &down))?;
    Ok(None)
}

fn without_leading(parsed: &mut Parsed, settled: &BTreeSet<Place>, reader: &Reader<'_>) -> Result<(), AdapterError> {
    let (c, trained_on) = (&reader.base.config, parsed.trained_on);
    for (place, module) in begun(parsed, settled) {
        let shape = place.shape(c);
        let top = reader.spectra.top(reader.base, place, module.rank)?;
        let (n, r) = (top.s.len(), module.rank.min(top.s.len()));
        let share = if trained_on == TrainedOn::WithoutScaledLeading { module.scale } else { 1.0 };
        let left: Vec<f64> = top.u.chunks_exact(n).flat_map(|row| (0..r).map(|j| row[j] * top.s[j] * share)).collect();
        let right: Vec<f64> = (0..r).flat_map(|j| top.v.chunks_exact(n).map(move |row| row[j])).collect();
        if trained_on == TrainedOn::WithoutScaledLeading {
            let taken = |o: usize, row: &mut [f64]| {
                row.fill(0.0);
                for (j, right) in right.chunks_exact(shape.1).enumerate() {
                    row.iter_mut().zip(right).for_each(|(x, v)| *x += left[o * r + j] * v);
                }
            };
            sorsa::check_residual(place, module, reader.base, &taken)?;
        }
        add(module, (place, shape), -1.0, (&left, &right))?;
    }
    Ok(())
}

/// OLoRA: `Q_r R_r` of the base's QR decomposition, times the scale. `Q_r` comes from the leading columns alone, and `R_r` is
/// `Q_r^T W`; their product does not depend on signs.
fn without_qr(parsed: &mut Parsed, settled: &BTreeSet<Place>, base: &Checkpoint) -> Result<(), AdapterError> {
    for (place, module) in begun(parsed, settled) {
        let shape @ (out, inputs) = place.shape(&base.config);
        let weight = base_weight(base, place);
        let r = module.rank.min(out).min(inputs);
        let q = Mat::from_fn(out, r, |o, j| f64::from(weight[o * inputs + j])).qr().compute_thin_Q();
        let mut right = vec![0.0; r * inputs];
        for o in 0..out {
            for j in 0..r {
                let q = q[(o, j)];
                right[j * inputs..][..inputs].iter_mut().zip(&weight[o * inputs..]).for_each(|(x, w)| *x += q * f64::from(*w));
            }
        }
        let left: Vec<f64> = (0..out).flat_map(|o| (0..r).map(move |j| (o, j))).map(|(o, j)| q[(o, j)] * module.scale).collect();
        add(module, (place, shape), -1.0, (&left, &right))?;
    }
    Ok(())
}

/// Modules that the test of [`not_residual`] looks at.
const LOOKED_AT: usize = 4;

/// Refuses a plain LoRA that is the leading part of the base over its own input space: one that was trained on a residual base.
///
/// With `Q` an orthonormal basis of the rows of `A`, PiSSA starts from `s B A = W Q Q^T`, and training moves it little; a LoRA starts
/// from zero. The cosine of the two sides and the ratio of their sizes tell them apart, at `rank * in * out` multiplications.
fn not_residual(parsed: &Parsed, base: &Checkpoint) -> Result<(), AdapterError> {
    let mut looked = 0;
    let linear = parsed.modules.iter().filter(|(p, m)| m.rank > 0 && matches!(p, Place::Layer(..)) && m.magnitude.is_none());
    for (&place, module) in linear.take(LOOKED_AT) {
        let (out, inputs) = place.shape(&base.config);
        let r = module.rank;
        if r >= inputs {
            return Ok(());
        }
        let q = Mat::from_fn(inputs, r, |i, j| f64::from(module.down[j * inputs + i])).qr().compute_thin_Q();
        let weight = base_weight(base, place);
        let weight = Mat::from_fn(out, inputs, |o, i| f64::from(weight[o * inputs + i]));
        let wide = |data: &[f32]| data.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let (up, down) = (wide(&module.up), wide(&module.down));
        let own = MatRef::from_row_major_slice(&up, out, r) * (MatRef::from_row_major_slice(&down, r, inputs) * &q);
        let theirs = weight * &q;
        let dot: f64 = (0..r).map(|j| own.col(j).transpose() * theirs.col(j)).sum();
        let (a, b) = (own.norm_l2(), theirs.norm_l2());
        // Far outside what a LoRA from zero comes to, far inside what training leaves of a PiSSA.
        if !(a > 0.0 && b > 0.0 && dot / (a * b) > 0.7 && (0.5..2.0).contains(&(a / b))) {
            return Ok(());
        }
        looked += 1;
    }
    if looked == 0 {
        return Ok(());
    }
    Err(AdapterError::NotServed {
        what: "its factors are the leading part of the base's own weights, as of a PiSSA adapter trained on a residual base".into(),
        mend: "name that base (base residual:FOLDER), or say base pissa if it was made from the served weights, base original if it is no PiSSA"
            .into(),
    })
}

/// With the weights of a residual base at hand: `W_res + s B A - W`.
fn from_residual(parsed: &mut Parsed, settled: &BTreeSet<Place>, path: &Path, reader: &Reader<'_>) -> Result<[u8; 32], AdapterError> {
    let real = reader.bounds.resolve(path)?;
    reader.bounds.confined(&real)?;
    // Not mapped: whoever may write below the adapters' root may cut these files short, which must not end the process.
    let residual = Unmapped::open(&real).map_err(|e| unreadable(path, e))?;
    let (c, served) = (&reader.base.config, residual.config());
    let refuse = |reason: String| Err(AdapterError::Base { base: path.display().to_string(), reason });
    if (c.layers, c.hidden, c.vocab, c.heads, c.kv_heads, c.intermediate)
        != (served.layers, served.hidden, served.vocab, served.heads, served.kv_heads, served.intermediate)
    {
        return refuse("it is a model of another shape than the served one".into());
    }
    if parsed.modules.get(&Place::Embed).is_some_and(|m| m.rank > 0) {
        let left = residual_weight(&residual, Place::Embed).map_err(|e| unreadable(path, e))?;
        // As far as rounding to bf16 goes.
        if left.iter().zip(&base_weight(reader.base, Place::Embed)).any(|(a, b)| (a - b).abs() > b.abs() / 128.0) {
            return refuse(
                "its embedding is not the served base's, and no adapter takes anything out of one; it is of another base".into(),
            );
        }
    }
    for (place, module) in begun(parsed, settled) {
        let (own, left) = (base_weight(reader.base, place), residual_weight(&residual, place).map_err(|e| unreadable(path, e))?);
        if left == own {
            return refuse(format!(
                "its {} is that of the served base, so nothing was taken out of it; is it the right folder?",
                place.path()
            ));
        }
        let rank = module.rank;
        if let Some(share) = add_difference(module, (place, place.shape(c)), &left, &own)? {
            return refuse(format!(
                "{} differs from the served weights by more than rank {rank} ({:.1} % of them); it is of another base",
                place.path(),
                share * 100.0
            ));
        }
    }
    residual.digest().map_err(|e| unreadable(path, e))
}

/// As [`base_weight`], of a residual base.
fn residual_weight(residual: &Unmapped, place: Place) -> Result<Vec<f32>, CheckpointError> {
    let weight = match place {
        Place::Layer(..) => residual.linear(&place.path())?.map(|(weight, _)| weight),
        Place::Embed | Place::Head => residual.floats(&place.tensor(residual.config()))?,
    };
    Ok(weight.expect("an opened checkpoint has every tensor its configuration asks for"))
}

/// Files that are there and cannot be read, or became shorter, are no fault of the model in them.
fn unreadable(path: &Path, error: CheckpointError) -> AdapterError {
    match error {
        CheckpointError::Io { path, source } if source.kind() != std::io::ErrorKind::NotFound => {
            AdapterError::Io { path: path.display().to_string(), reason: source.to_string() }
        }
        error => AdapterError::base(path, &error),
    }
}

/// With the adapter as it was before training: `s B A - s B_0 A_0`.
fn from_initial(parsed: &mut Parsed, settled: &BTreeSet<Place>, path: &Path, reader: &Reader<'_>) -> Result<[u8; 32], AdapterError> {
    let files = reader.bounds.read(path)?;
    let initial = peft::parse(&files, reader.base)?;
    let refuse = |reason: String| Err(AdapterError::Base { base: path.display().to_string(), reason });
    let trained = |p: &Parsed| p.modules.iter().filter(|(_, m)| m.rank > 0).map(|(p, _)| *p).collect::<Vec<_>>();
    if trained(parsed) != trained(&initial) {
        return refuse("the initial adapter has other modules than the trained one".into());
    }
    for (&place, module) in parsed.modules.iter_mut().filter(|(p, m)| m.rank > 0 && !settled.contains(p)) {
        let before = &initial.modules[&place];
        if before.rank != module.rank || before.scale != module.scale {
            return refuse(format!("the initial adapter has another rank or scale at {}", place.path()));
        }
        if place == Place::Embed {
            if before.up.iter().all(|v| *v == 0.0) || before.down.iter().all(|v| *v == 0.0) {
                continue;
            }
            return refuse(
                "the initial adapter's embedding does not begin at zero, as all of PEFT's do; is it one before training?".into(),
            );
        }
        let wide = |data: &[f32]| data.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        add(module, (place, place.shape(&reader.base.config)), -1.0, (&wide(&before.up), &wide(&before.down)))?;
    }
    Ok(files.digest)
}
