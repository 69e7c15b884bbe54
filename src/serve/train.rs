//! `strait compress --train-steps`: closed-form bases, trained from there, and both in one artifact.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::calibrate::{self, Calibrated};
use crate::compress::artifact::{Artifact, BasisSet, Fingerprint, StoredProfile};
use crate::config::Settings;
use crate::config::args::{self, LossArg};
use crate::ids::TokenId;
use crate::kv::layout::Profile;
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::weights::LoadDtype;
use crate::ops::cpu::Cpu;
use crate::ops::{Matrix, RopeTable};
use crate::serve::ready::{self, Calibration, Opened};
use crate::train::{self, Directory, Identity, Loss, Model, Subject, TrainedLayer, trained_basis};

/// Batches are the same in every training: what differs between two is what was asked for.
const SEED: u64 = 0;

/// Computes, trains and writes what `strait compress` was asked for, going on where an earlier run in the directory stopped.
///
/// # Errors
/// Where a profile to train is not there or does not compress, the text is too short, the directory is of another training or is
/// where the artifact is to lie, the learning rate too high, or something cannot be written.
pub fn compress(
    ask: &args::Compress,
    (steps, dir): (u64, &Path),
    settings: &Settings,
    opened: &Opened,
    (decoder, ops): (&mut Decoder<'_>, &Cpu),
    (how, bar): (&Calibration<'_>, &ProgressBar),
) -> anyhow::Result<()> {
    let model = &opened.checkpoint.config;
    let real = |path: &Path| if path.as_os_str().is_empty() { Path::new(".").canonicalize() } else { path.canonicalize() }.ok();
    if real(dir).is_some_and(|dir| ask.out.parent().and_then(real) == Some(dir)) {
        // It could take the place of the artifact that training starts from, and the same command would then start from that.
        bail!("--out {} lies in the training directory, whose files are the training's own; name another place", ask.out.display());
    }
    let chosen = chosen(&settings.profiles, &ask.train.train_profiles)?;
    let learning_rate = ask.train.train_lr;
    if !(learning_rate > 0.0 && learning_rate <= 1.0) {
        bail!("--train-lr is {learning_rate}; it must be above 0 and at most 1");
    }
    let loss = match ask.train.train_loss {
        LossArg::Reconstruction => Loss::Reconstruction,
        LossArg::Attention => Loss::Attention,
    };
    let training = train::Settings { loss, steps, learning_rate, seed: SEED };
    let texts = ready::calibration_tokens(opened, decoder, ops, &settings.profiles, how)?;
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let base = opened.fingerprint;
    let init = format!("{:?}", ask.init).to_lowercase();
    // A training that cannot be must not begin a directory, nor take long to say so.
    chosen.iter().try_for_each(|profile| train::problem::pieces(&lengths, profile, loss).map(drop))?;
    let directory = Directory::open(dir, &identity(base, &texts, &init, settings, &chosen, &training))?;
    let mut out = std::io::stdout();
    // Nobody may be reading; that is no reason not to train.
    let mut say = move |line: String| drop(writeln!(out, "{line}"));

    let begun = Instant::now();
    let total = lengths.iter().sum();
    if !directory.recorded(model, total) {
        record(&directory, opened, &texts, (decoder, ops), how)?;
    }
    let start = directory.start();
    let untrained = if start.exists() {
        say(format!("going on in {}", dir.display()));
        let damaged = || format!("{} is damaged; remove it, and the same command makes it anew", start.display());
        Artifact::read(&start, model, base).with_context(damaged)?
    } else {
        let Calibrated { artifact, energy } = ready::compute_on(opened, decoder, ops, &settings.profiles, how, &texts)?;
        artifact.write(&start)?;
        say(format!("calibrated on {total} tokens in {:.1} s", begun.elapsed().as_secs_f64()));
        energy.iter().for_each(|energy| say(energy.to_string()));
        artifact
    };

    bar.finish_and_clear();
    let subject = |p: &&Profile| Ok(Subject { profile: (*p).clone(), start: untrained.layers(p)?, widths: untrained.widths(p)? });
    let subjects = chosen.iter().map(subject).collect::<anyhow::Result<Vec<_>>>()?;
    let rope = RopeTable::new(model, lengths.iter().copied().max().unwrap_or(0));
    let dense: Vec<_> = decoder.weights().layers.iter().map(|l| l.o.dense()).collect();
    let outputs: Vec<Matrix<'_>> = dense.iter().map(|w| w.matrix()).collect();
    let facts = Model { config: model, rope: &rope, outputs: &outputs };
    let begun = Instant::now();
    let trained = train_all(&directory, facts, &lengths, &subjects, &training, settings.threads)?;
    say(format!("trained {steps} steps by {} in {:.1} s; curves in {}", loss.name(), begun.elapsed().as_secs_f64(), dir.display()));
    for (subject, layers) in subjects.iter().zip(&trained) {
        let losses: String = layers.iter().map(|l| format!(" {:.3}>{:.3}", l.before, l.after)).collect();
        say(format!("{} loses on held-out text, before > after by layer:{losses}", subject.profile.name));
    }
    let artifact = with_trained(&untrained, model, &subjects, trained)?;
    artifact.write(&ask.out)?;
    say(format!("wrote {} ({} bytes)", ask.out.display(), std::fs::metadata(&ask.out)?.len()));
    Ok(())
}

/// Whether a profile has a basis that is computed.
fn trainable(profile: &Profile) -> bool {
    profile.cskv.as_ref().is_some_and(|c| c.basis.is_computed())
}

/// The profiles to train: those named, or all that compress.
fn chosen<'a>(profiles: &'a [Profile], names: &[String]) -> anyhow::Result<Vec<&'a Profile>> {
    if names.is_empty() {
        return Ok(profiles.iter().filter(|p| trainable(p)).collect());
    }
    let mut chosen: Vec<&Profile> = Vec::new();
    for name in names {
        let Some(profile) = profiles.iter().find(|p| p.name == *name) else {
            let known: Vec<&str> = profiles.iter().filter(|p| trainable(p)).map(|p| p.name.as_str()).collect();
            bail!(
                "there is no cache profile {name:?} to train; choose of {}, or define it under [profiles] in a --config file",
                known.join(", ")
            );
        };
        if !trainable(profile) {
            bail!("cache profile {name:?} has no basis that is computed, so there is nothing to train; leave it out of --train-profiles");
        }
        if !chosen.iter().any(|p| p.name == *name) {
            chosen.push(profile);
        }
    }
    Ok(chosen)
}

/// Everything that the files of a training depend on.
fn identity(
    base: Fingerprint,
    texts: &[Vec<TokenId>],
    init: &str,
    settings: &Settings,
    chosen: &[&Profile],
    training: &train::Settings,
) -> Identity {
    let mut digest = blake3::Hasher::new();
    for text in texts {
        digest.update(&(text.len() as u64).to_le_bytes());
        for token in text {
            digest.update(&token.to_le_bytes());
        }
    }
    let mut identity: Identity = [
        ("format", "strait-training 4".to_owned()),
        ("base", base.to_string()),
        ("text", digest.finalize().to_hex().to_string()),
        ("--init", init.to_owned()),
        ("--train-loss", training.loss.name().to_owned()),
        ("--train-steps", training.steps.to_string()),
        ("--train-lr", training.learning_rate.to_string()),
        ("seed", training.seed.to_string()),
        ("list of profiles to train", chosen.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ")),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
    if settings.dtype != LoadDtype::Auto {
        identity.insert("--dtype".to_owned(), format!("{:?}", settings.dtype).to_lowercase());
    }
    for profile in &settings.profiles {
        if let Some(cskv) = &profile.cskv {
            identity.insert(format!("cache profile {}", profile.name), format!("{cskv:?}"));
        }
    }
    identity
}

/// Runs the texts through the model once and keeps what every layer makes of them.
fn record(
    directory: &Directory,
    opened: &Opened,
    texts: &[Vec<TokenId>],
    (decoder, ops): (&mut Decoder<'_>, &Cpu),
    how: &Calibration<'_>,
) -> anyhow::Result<()> {
    let mut recorder = directory.recorder(&opened.checkpoint.config)?;
    let total = texts.iter().map(Vec::len).sum();
    calibrate::show(decoder, ops, texts, &mut recorder, |recorder, seen| {
        (how.progress)("tokens recorded", seen, total);
        Ok(recorder.check()?)
    })?;
    recorder.finish()?;
    Ok(())
}

/// Trains under a bar that counts the steps of all layers together.
fn train_all(
    directory: &Directory,
    model: Model<'_>,
    lengths: &[usize],
    subjects: &[Subject],
    training: &train::Settings,
    threads: usize,
) -> anyhow::Result<Vec<Vec<TrainedLayer>>> {
    let layers: usize = subjects.iter().map(|s| s.start.len()).sum();
    let bar = ProgressBar::new(layers as u64 * training.steps);
    let style = ProgressStyle::with_template("training {bar:32} {pos}/{len} steps over all layers, {eta} left");
    bar.set_style(style.expect("a valid template"));
    // Where each layer stands: one that goes on begins beyond zero, and those steps say nothing about speed.
    let standing: Mutex<BTreeMap<(String, usize), u64>> = Mutex::new(BTreeMap::new());
    let progress = |profile: &str, layer: usize, step: u64| {
        let mut standing = standing.lock().expect("no thread panics with it");
        let before = standing.insert((profile.to_owned(), layer), step);
        if before.is_none() && step > 1 {
            bar.inc(step);
            bar.reset_eta();
        } else {
            bar.inc(step - before.unwrap_or(0));
        }
    };
    let trained = train::train(directory, model, lengths, subjects, training, (threads, &progress))?;
    bar.finish_and_clear();
    Ok(trained)
}

/// The untrained artifact with a basis set of its own for each trained profile.
fn with_trained(
    untrained: &Artifact,
    model: &ModelConfig,
    subjects: &[Subject],
    trained: Vec<Vec<TrainedLayer>>,
) -> anyhow::Result<Artifact> {
    let mut bases: Vec<BasisSet> = untrained.bases().to_vec();
    let mut profiles: Vec<StoredProfile> = untrained.profiles().to_vec();
    for (subject, layers) in subjects.iter().zip(trained) {
        // Names of bases have no dots; and one may be that of a profile.
        let mut name = subject.profile.name.replace('.', "_");
        while bases.iter().any(|b| b.name == name) {
            name.push_str("-trained");
        }
        let stored = profiles.iter_mut().find(|p| p.profile.name == subject.profile.name).expect("the artifact was made for every profile");
        let of = untrained.bases().iter().find(|b| b.name == stored.basis).expect("a stored profile reads a basis of its artifact");
        let layers = layers.iter().map(|l| trained_basis(&l.maps)).collect();
        bases.push(BasisSet { name: name.clone(), heads_per_group: of.heads_per_group, init: of.init, layers });
        stored.basis = name;
    }
    Ok(Artifact::new(untrained.base(), model, bases, profiles)?)
}
