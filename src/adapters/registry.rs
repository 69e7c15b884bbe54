//! Which adapters there are, and who holds them: alias -> generation -> lease.
//!
//! ```text
//! alias        a name clients use; points to one generation, and remembers earlier ones
//! generation   the content of an adapter, named by its hash: on disk, or resident in memory
//! lease        a request's hold on a resident generation, from its admission to its end
//! ```
//!
//! A replaced or unloaded generation stays as long as somebody leases it, and not a moment longer, but for those an alias may be
//! rolled back to, which stay while there is room. Bytes are counted from the moment a generation becomes resident until it is
//! dropped; [`Registry::check`] says whether the books are right.
//!
//! Invariants: resident bytes are the sum over resident generations and never exceed the budget; whatever is leased is resident; a
//! generation that no alias points to or remembers and nobody leases is not resident.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

use crate::adapters::base::Spectra;
use crate::adapters::folder::Bounds;
use crate::adapters::{AdapterError, BaseChoice, Facts, Reader, Ready};
use crate::ids::AdapterGeneration;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::delta::{Delta, HeldAs, Site};

/// Earlier generations an alias remembers.
const HISTORY: usize = 8;
/// First uses that read at once: each may take a core and a few times the adapter's bytes. An operator's load may work beside them.
const LOADS: usize = 2;
/// Longest name, in bytes.
const NAME_MAX: usize = 256;

/// What the registry may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of all resident adapters.
    pub bytes: u64,
    /// Of all that lie on a device at once, where one serves: none is larger.
    pub device_bytes: Option<u64>,
    /// Of any update of an adapter as stored.
    pub rank: usize,
    /// Where clients may have adapters loaded from; without it they may not.
    pub root: Option<PathBuf>,
    /// Every adapter folder directly under the root is known by its name, and read when it is first asked for.
    pub discover: bool,
    /// Names of the served model, which no adapter may take.
    pub reserved: Vec<String>,
}

/// Where an adapter is, and on which base it belongs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub base: BaseChoice,
    /// Named by the operator at start: it may lie outside the root.
    pub trusted: bool,
}

/// How an adapter is to be loaded.
#[derive(Clone, Debug, Default)]
pub struct Load {
    pub alias: String,
    pub path: PathBuf,
    pub base: BaseChoice,
    /// Replace what the alias points to.
    pub in_place: bool,
    /// Never evict it.
    pub pinned: bool,
    /// Only if the alias points to this generation now.
    pub expected: Option<AdapterGeneration>,
    /// The operator's own word: the root does not bind it.
    pub trusted: bool,
}

/// What a load did.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub generation: AdapterGeneration,
    pub replaced: Option<AdapterGeneration>,
    pub facts: Facts,
    pub seconds: f64,
}

/// What an unload did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Unloaded {
    /// Bytes that are free now.
    pub freed_bytes: u64,
    /// Requests that finish on what was unloaded, and the bytes that are free when they have.
    pub leases: usize,
    pub retiring_bytes: u64,
}

/// Something worth counting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happened {
    Loaded { seconds: f64 },
    Failed,
    Evicted,
}

/// One alias, as an operator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct AliasState {
    pub alias: String,
    pub path: PathBuf,
    pub base: String,
    /// `None` before it was first read.
    pub generation: Option<AdapterGeneration>,
    pub facts: Option<Facts>,
    pub resident: bool,
    pub pinned: bool,
    /// Unix seconds of the latest load or replacement.
    pub created: u64,
    /// Requests that took a lease under this name.
    pub requests: u64,
    /// Running requests that hold its generation.
    pub leases: usize,
    /// Earlier generations it may go back to, latest last.
    pub history: Vec<AdapterGeneration>,
}

/// One resident generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationState {
    pub generation: AdapterGeneration,
    pub aliases: Vec<String>,
    pub rank: usize,
    pub bytes: u64,
    /// No alias points to it any more.
    pub retired: bool,
    pub leases: usize,
}

/// Everything there is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub aliases: Vec<AliasState>,
    pub generations: Vec<GenerationState>,
    pub resident_bytes: u64,
    pub budget_bytes: u64,
    /// `None` where no device serves.
    pub device_budget_bytes: Option<u64>,
    pub max_rank: usize,
    /// Names whose adapters are being read for their first use.
    pub loading: Vec<String>,
    /// Bytes of an adapter of rank 16 on all linear layers.
    pub usual_bytes: u64,
}

/// All adapters of one model. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

struct Shared {
    base: &'static Checkpoint,
    held: HeldAs,
    spectra: Spectra,
    limits: Limits,
    books: Mutex<Books>,
    /// First uses that may read at once.
    first_uses: Semaphore,
    /// Held while an operator's load reads.
    turn: Mutex<()>,
    tell: Tell,
}

/// Hears of what happened.
pub type Tell = Box<dyn Fn(Happened) + Send + Sync>;

type Verdict = Result<AdapterGeneration, AdapterError>;

#[derive(Default)]
struct Books {
    aliases: BTreeMap<String, Alias>,
    generations: HashMap<AdapterGeneration, Generation>,
    /// First uses under way, by alias: whoever else asks waits for the same one.
    loading: HashMap<String, watch::Receiver<Option<Result<(), AdapterError>>>>,
    /// Unloaded names that the root still holds: they are not found there again, but loaded.
    revoked: BTreeSet<String>,
    resident_bytes: u64,
    clock: u64,
}

struct Alias {
    source: Source,
    generation: Option<AdapterGeneration>,
    /// With where each came from.
    history: Vec<(AdapterGeneration, Source)>,
    pinned: bool,
    created: u64,
    requests: u64,
}

struct Generation {
    digest: [u8; 32],
    facts: Facts,
    /// `None`: on disk alone.
    delta: Option<Arc<Delta>>,
    leases: usize,
    /// Loads that read it and have not given it a name yet.
    loads: usize,
    /// Aliases that point to it or remember it, and those of them that pin it.
    names: usize,
    pins: usize,
    last_used: u64,
}

impl Generation {
    /// Whether somebody would miss its weights.
    fn is_held(&self) -> bool {
        self.leases > 0 || self.loads > 0
    }
}

/// A request's hold on a resident generation.
pub struct Lease {
    generation: AdapterGeneration,
    delta: Arc<Delta>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({:016x})", self.generation.0)
    }
}

impl Lease {
    /// What it holds.
    pub fn generation(&self) -> AdapterGeneration {
        self.generation
    }

    /// What that changes of the model.
    pub fn delta(&self) -> Arc<Delta> {
        self.delta.clone()
    }
}

impl Clone for Lease {
    fn clone(&self) -> Lease {
        let mut books = self.shared.lock();
        books.generations.get_mut(&self.generation).expect("what is leased is in the books").leases += 1;
        Lease { generation: self.generation, delta: self.delta.clone(), shared: self.shared.clone() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut books = self.shared.lock();
        books.generations.get_mut(&self.generation).expect("what is leased is in the books").leases -= 1;
        let (_, dropped) = books.release(self.generation);
        drop(books);
        // Giving back much memory takes a while, in which nobody needs to wait for the books.
        drop(dropped);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The adapter at `source`, read and made ready.
    fn ready(&self, source: &Source) -> Result<Ready, AdapterError> {
        let root = if source.trusted { None } else { self.limits.root.clone() };
        // Stored in twice as wide a type than it is held in, a file is twice as long as what it becomes.
        let bounds = Bounds { root, bytes: self.limits.bytes.saturating_mul(2) };
        let reader = Reader { base: self.base, spectra: &self.spectra, bounds, rank: self.limits.rank };
        reader.ready(&source.path, &source.base, self.held)
    }

    /// Puts what was read into the books, unless it is there already; makes room first.
    fn admit(&self, ready: Ready) -> Verdict {
        let mut gone = Vec::new();
        if let Some(budget) = self.limits.device_bytes.filter(|budget| ready.facts.bytes > *budget) {
            return Err(AdapterError::NeverFitsDevice { bytes: ready.facts.bytes, budget });
        }
        let verdict = self.lock().admit(ready, self.limits.bytes, &mut gone);
        gone.iter().for_each(|_| (self.tell)(Happened::Evicted));
        verdict
    }

    /// Reads an adapter, which an alias may know as a generation already, and makes it resident. Until [`Books::named`] it is held
    /// for whoever called.
    fn read_and_admit(&self, source: &Source, known: Option<(&str, AdapterGeneration)>) -> Result<(AdapterGeneration, f64), AdapterError> {
        let begun = Instant::now();
        let read = || {
            let ready = self.ready(source)?;
            match known {
                // Seen before anybody makes room for it.
                Some((alias, was)) if was != ready.generation => {
                    Err(AdapterError::FilesChanged { alias: shown(alias), was: format!("{:016x}", was.0) })
                }
                _ => self.admit(ready),
            }
        };
        let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
        let verdict = verdict.unwrap_or_else(|_| {
            tracing::error!(path = %source.path.display(), "loading an adapter panicked");
            Err(AdapterError::Internal)
        });
        let seconds = begun.elapsed().as_secs_f64();
        (self.tell)(if verdict.is_ok() { Happened::Loaded { seconds } } else { Happened::Failed });
        verdict.map(|generation| (generation, seconds))
    }

    /// As [`Shared::read_and_admit`], one caller after another: for those who may wait.
    fn read_in_turn(&self, source: &Source, known: Option<(&str, AdapterGeneration)>) -> Result<(AdapterGeneration, f64), AdapterError> {
        let _turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.read_and_admit(source, known)
    }
}

impl Books {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn admit(&mut self, ready: Ready, budget: u64, gone: &mut Vec<Arc<Delta>>) -> Verdict {
        let Ready { generation, digest, facts, delta } = ready;
        let tick = self.tick();
        if let Some(known) = self.generations.get_mut(&generation) {
            if known.digest != digest {
                // Sixty-four bits of a hash: this does not happen, and must not be served if it does.
                return Err(AdapterError::Internal);
            }
            known.last_used = tick;
            if known.delta.is_some() {
                known.loads += 1;
                return Ok(generation);
            }
        }
        let bytes = facts.bytes;
        if bytes > budget {
            return Err(AdapterError::NeverFits { bytes, budget });
        }
        // Nothing is evicted for what does not fit even then.
        let free: u64 = self.generations.values().filter(|g| g.delta.is_some() && !g.is_held() && g.pins == 0).map(|g| g.facts.bytes).sum();
        if self.resident_bytes - free + bytes > budget {
            return Err(AdapterError::Busy { bytes, held: self.resident_bytes - free, budget });
        }
        while self.resident_bytes + bytes > budget {
            let Some(oldest) = self.evictable() else { return Err(AdapterError::Internal) };
            gone.extend(self.evict(oldest));
        }
        self.resident_bytes += bytes;
        let delta = Some(Arc::new(delta));
        let fresh = Generation { digest, facts, delta: None, leases: 0, loads: 0, names: 0, pins: 0, last_used: tick };
        let generation_books = self.generations.entry(generation).or_insert(fresh);
        (generation_books.delta, generation_books.last_used) = (delta, tick);
        generation_books.loads += 1;
        Ok(generation)
    }

    /// The resident generation longest unused that nobody holds and no alias pins.
    fn evictable(&self) -> Option<AdapterGeneration> {
        let free = self.generations.iter().filter(|(_, g)| g.delta.is_some() && !g.is_held() && g.pins == 0);
        free.min_by_key(|(_, g)| g.last_used).map(|(id, _)| *id)
    }

    /// Takes a generation out of memory.
    fn evict(&mut self, id: AdapterGeneration) -> Option<Arc<Delta>> {
        let generation = self.generations.get_mut(&id)?;
        let delta = generation.delta.take()?;
        self.resident_bytes -= generation.facts.bytes;
        Some(delta)
    }

    /// Ends the hold of whoever read a generation: it has its name by now, or goes.
    #[must_use]
    fn named(&mut self, id: AdapterGeneration) -> Option<Arc<Delta>> {
        if let Some(generation) = self.generations.get_mut(&id) {
            generation.loads -= 1;
        }
        self.release(id).1
    }

    /// Drops a generation that no alias names and nobody holds: the bytes that are free by it, and what to drop once the books are
    /// closed, as giving back much memory takes a while.
    fn release(&mut self, id: AdapterGeneration) -> (u64, Option<Arc<Delta>>) {
        if self.generations.get(&id).is_none_or(|g| g.is_held() || g.names > 0) {
            return (0, None);
        }
        let delta = self.evict(id);
        let gone = self.generations.remove(&id);
        (gone.filter(|_| delta.is_some()).map_or(0, |g| g.facts.bytes), delta)
    }

    /// Counts an alias into the generations it names, or out of them.
    fn count(&mut self, alias: &Alias, by: isize) {
        let ids = alias.generation.iter().map(|id| (id, alias.pinned)).chain(alias.history.iter().map(|(id, _)| (id, false)));
        for (id, pins) in ids {
            if let Some(generation) = self.generations.get_mut(id) {
                generation.names = generation.names.saturating_add_signed(by);
                generation.pins = generation.pins.saturating_add_signed(if pins { by } else { 0 });
            }
        }
    }

    /// Changes what an alias names, and releases what that leaves unnamed.
    fn change(&mut self, name: &str, change: impl FnOnce(&mut Alias)) -> Vec<Arc<Delta>> {
        let Some(mut alias) = self.aliases.remove(name) else { return Vec::new() };
        self.count(&alias, -1);
        let before: Vec<AdapterGeneration> = alias.ids().collect();
        change(&mut alias);
        self.count(&alias, 1);
        self.aliases.insert(name.to_owned(), alias);
        before.into_iter().filter_map(|id| self.release(id).1).collect()
    }

    fn lease(&mut self, alias: &str, shared: &Arc<Shared>) -> Option<Lease> {
        let tick = self.tick();
        let alias = self.aliases.get_mut(alias)?;
        let id = alias.generation?;
        let generation = self.generations.get_mut(&id)?;
        let delta = generation.delta.clone()?;
        alias.requests += 1;
        generation.leases += 1;
        generation.last_used = tick;
        Some(Lease { generation: id, delta, shared: shared.clone() })
    }
}

impl Registry {
    /// No adapters yet, for a model whose linear layers are held as `held`. `tell` hears of loads and evictions.
    pub fn new((base, held): (&'static Checkpoint, HeldAs), spectra: Spectra, limits: Limits, tell: Tell) -> Registry {
        let shared = Shared {
            base,
            held,
            spectra,
            limits,
            books: Mutex::default(),
            first_uses: Semaphore::new(LOADS),
            turn: Mutex::default(),
            tell,
        };
        Registry { shared: Arc::new(shared) }
    }

    /// Whether `name` is an adapter's; looks into the root where adapters are discovered there.
    pub fn knows(&self, name: &str) -> bool {
        if self.shared.lock().aliases.contains_key(name) {
            return true;
        }
        if self.shared.lock().revoked.contains(name) {
            return false;
        }
        let Some(source) = self.discovered(name) else { return false };
        let mut books = self.shared.lock();
        books.aliases.entry(name.to_owned()).or_insert_with(|| Alias::new(source));
        true
    }

    /// An adapter folder of this name directly under the root. A look, not a promise: it is read when it is asked for.
    fn discovered(&self, name: &str) -> Option<Source> {
        let limits = &self.shared.limits;
        let root = limits.root.as_ref().filter(|_| limits.discover)?;
        if check_name(name, &limits.reserved).is_err() || name.contains(['/', '\\']) || name.starts_with('.') {
            return None;
        }
        let path = PathBuf::from(name);
        holds_adapter(&root.join(&path)).then_some(Source { path, base: BaseChoice::Auto, trusted: false })
    }

    /// Registers every adapter folder under the root, without reading any; how many there are, and which are left out for their
    /// name, in order.
    ///
    /// # Errors
    /// Where the root cannot be listed.
    pub fn discover(&self) -> std::io::Result<(usize, Vec<(String, AdapterError)>)> {
        let limits = &self.shared.limits;
        let (mut found, mut left_out) = (0, Vec::new());
        let Some(root) = limits.root.as_ref().filter(|_| limits.discover) else { return Ok((found, left_out)) };
        for entry in std::fs::read_dir(root)? {
            let name = entry?.file_name();
            let spelled = name.to_string_lossy();
            if name.to_str().is_some_and(|name| self.knows(name)) {
                found += 1;
            } else if !spelled.starts_with('.') && holds_adapter(&root.join(&name)) {
                let checked = match name.to_str() {
                    Some(name) => check_name(name, &limits.reserved),
                    None => Err(AdapterError::Name { reason: "an adapter's name is UTF-8" }),
                };
                left_out.extend(checked.err().map(|error| (shown(&spelled), error)));
            }
        }
        left_out.sort_by(|a, b| a.0.cmp(&b.0));
        Ok((found, left_out))
    }

    /// A lease on what `alias` points to, if that is in memory.
    pub fn resident(&self, alias: &str) -> Option<Lease> {
        self.shared.lock().lease(alias, &self.shared)
    }

    /// A lease on what `alias` points to now. One that is on disk is read first; all who ask meanwhile wait for that one read.
    ///
    /// # Errors
    /// Where there is no such alias, or it cannot be made resident.
    pub async fn acquire(&self, alias: &str) -> Result<Lease, AdapterError> {
        // What was read may be evicted again before its lease is taken, by others who are as hurried.
        for _ in 0..16 {
            let mut waiting = {
                let mut books = self.shared.lock();
                if let Some(lease) = books.lease(alias, &self.shared) {
                    return Ok(lease);
                }
                let Some(known) = books.aliases.get(alias) else { return Err(AdapterError::Unknown { alias: shown(alias) }) };
                let (source, expected) = (known.source.clone(), known.generation);
                match books.loading.get(alias) {
                    Some(waiting) => waiting.clone(),
                    None => {
                        let (done, waiting) = watch::channel(None);
                        books.loading.insert(alias.to_owned(), waiting.clone());
                        drop(books);
                        self.first_use(alias.to_owned(), source, expected, done);
                        waiting
                    }
                }
            };
            let verdict = match waiting.wait_for(Option::is_some).await {
                Ok(verdict) => verdict.clone().expect("waited for"),
                Err(_) => Err(AdapterError::Internal),
            };
            verdict?;
        }
        Err(AdapterError::Thrashing { budget: self.shared.limits.bytes })
    }

    /// Reads an alias' adapter on a thread that may block, and tells all who wait.
    fn first_use(
        &self,
        alias: String,
        source: Source,
        expected: Option<AdapterGeneration>,
        done: watch::Sender<Option<Result<(), AdapterError>>>,
    ) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            // Waited for here: threads that may block are few, and others need them.
            let permit = shared.first_uses.acquire().await;
            let reading = {
                let (shared, source, alias) = (shared.clone(), source.clone(), alias.clone());
                tokio::task::spawn_blocking(move || shared.read_and_admit(&source, expected.map(|id| (&*alias, id))))
            };
            let read = reading.await.unwrap_or(Err(AdapterError::Internal)).map(|(generation, _)| generation);
            drop(permit);
            let mut books = shared.lock();
            books.loading.remove(&alias);
            let verdict = books.settle(&alias, &source, expected, read.clone());
            let gone = read.ok().and_then(|generation| books.named(generation));
            drop(books);
            drop(gone);
            let _ = done.send(Some(verdict));
        });
    }

    /// Loads an adapter under an alias, now: reads, checks, makes room, and only then changes what the alias points to.
    ///
    /// # Errors
    /// As they say; the alias then points to what it did before, and nothing of the new adapter stays.
    pub fn load(&self, load: &Load) -> Result<Loaded, AdapterError> {
        check_name(&load.alias, &self.shared.limits.reserved)?;
        if !load.trusted && self.shared.limits.root.is_none() {
            return Err(AdapterError::NoRoot);
        }
        self.shared.lock().may_load(load)?;
        let source = Source { path: load.path.clone(), base: load.base.clone(), trusted: load.trusted };
        let (generation, seconds) = self.shared.read_in_turn(&source, None)?;
        let mut books = self.shared.lock();
        // Somebody else may have been quicker; what was read for nothing is not kept.
        if let Err(error) = books.may_load(load) {
            let gone = books.named(generation);
            drop(books);
            drop(gone);
            return Err(error);
        }
        let facts = books.generations[&generation].facts.clone();
        books.revoked.remove(&load.alias);
        books.aliases.entry(load.alias.clone()).or_insert_with(|| Alias::new(source.clone()));
        let mut replaced = None;
        let mut gone = books.change(&load.alias, |alias| {
            replaced = alias.generation.filter(|old| *old != generation);
            let old_source = std::mem::replace(&mut alias.source, source);
            if let Some(old) = replaced {
                alias.remember(old, old_source);
            }
            alias.history.retain(|(g, _)| *g != generation);
            alias.generation = Some(generation);
            alias.pinned = load.pinned;
            alias.created = now();
        });
        gone.extend(books.named(generation));
        drop(books);
        drop(gone);
        Ok(Loaded { generation, replaced, facts, seconds })
    }

    /// Takes an alias away. Its generations go at once, or when the last request on them ends.
    ///
    /// # Errors
    /// Where there is no such alias.
    pub fn unload(&self, alias: &str) -> Result<Unloaded, AdapterError> {
        let mut books = self.shared.lock();
        let Some(gone) = books.aliases.remove(alias) else { return Err(AdapterError::Unknown { alias: shown(alias) }) };
        books.count(&gone, -1);
        books.revoked.insert(alias.to_owned());
        let mut out = Unloaded::default();
        let ids: BTreeSet<AdapterGeneration> = gone.ids().collect();
        let mut dropped = Vec::new();
        for id in ids {
            let (freed, delta) = books.release(id);
            out.freed_bytes += freed;
            dropped.extend(delta);
            if let Some(left) = books.generations.get(&id).filter(|g| g.leases > 0 && g.names == 0) {
                out.leases += left.leases;
                out.retiring_bytes += left.facts.bytes;
            }
        }
        drop(books);
        drop(dropped);
        Ok(out)
    }

    /// Points an alias back to an earlier generation: the latest before this one, or `to`. What it pointed to is remembered in turn.
    ///
    /// # Errors
    /// Where there is none, or its files are no longer what they were.
    pub fn rollback(&self, alias: &str, to: Option<AdapterGeneration>) -> Result<Loaded, AdapterError> {
        let (id, source) = {
            let books = self.shared.lock();
            let Some(known) = books.aliases.get(alias) else { return Err(AdapterError::Unknown { alias: shown(alias) }) };
            let found = known.history.iter().rev().find(|(g, _)| to.is_none_or(|to| to == *g));
            found.cloned().ok_or_else(|| AdapterError::NoHistory { alias: shown(alias) })?
        };
        let resident = {
            let mut books = self.shared.lock();
            let resident = books.generations.get_mut(&id).filter(|g| g.delta.is_some());
            resident.map(|g| g.loads += 1).is_some()
        };
        let (read, seconds) = if resident { (id, 0.0) } else { self.shared.read_in_turn(&source, Some((alias, id)))? };
        let mut books = self.shared.lock();
        let facts = books.generations[&read].facts.clone();
        let there = books.aliases.get(alias).map(|a| a.history.iter().any(|(g, _)| *g == id));
        let mut replaced = None;
        let mut gone = Vec::new();
        let verdict = match there {
            None => Err(AdapterError::Unknown { alias: shown(alias) }),
            // Somebody replaced or rolled back meanwhile.
            Some(false) => Err(AdapterError::NoHistory { alias: shown(alias) }),
            Some(true) => {
                gone = books.change(alias, |known| {
                    known.history.retain(|(g, _)| *g != id);
                    let old_source = std::mem::replace(&mut known.source, source);
                    replaced = known.generation.replace(id);
                    if let Some(old) = replaced {
                        known.remember(old, old_source);
                    }
                    known.created = now();
                });
                Ok(())
            }
        };
        gone.extend(books.named(read));
        drop(books);
        drop(gone);
        verdict.map(|()| Loaded { generation: id, replaced, facts, seconds })
    }

    /// Everything there is, aliases in order.
    pub fn state(&self) -> State {
        let books = self.shared.lock();
        let mut named: HashMap<AdapterGeneration, Vec<String>> = HashMap::new();
        for (name, alias) in &books.aliases {
            if let Some(id) = alias.generation {
                named.entry(id).or_default().push(name.clone());
            }
        }
        let mut generations: Vec<GenerationState> = books
            .generations
            .iter()
            .filter(|(_, g)| g.delta.is_some())
            .map(|(&id, g)| {
                let aliases = named.remove(&id).unwrap_or_default();
                let retired = aliases.is_empty();
                GenerationState { generation: id, aliases, rank: g.facts.rank, bytes: g.facts.bytes, retired, leases: g.leases }
            })
            .collect();
        generations.sort_unstable_by_key(|g| g.generation);
        State {
            aliases: books.aliases.iter().map(|(name, a)| books.show(name, a)).collect(),
            generations,
            resident_bytes: books.resident_bytes,
            budget_bytes: self.shared.limits.bytes,
            device_budget_bytes: self.shared.limits.device_bytes,
            max_rank: self.shared.limits.rank,
            loading: {
                let mut names: Vec<String> = books.loading.keys().cloned().collect();
                names.sort_unstable();
                names
            },
            usual_bytes: usual_bytes(&self.shared.base.config, self.shared.held),
        }
    }

    /// One alias.
    pub fn alias(&self, alias: &str) -> Option<AliasState> {
        let books = self.shared.lock();
        books.aliases.get(alias).map(|a| books.show(alias, a))
    }

    /// Whether the books agree with themselves.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        let books = self.shared.lock();
        let resident = |g: &&Generation| g.delta.is_some();
        let sum: u64 = books.generations.values().filter(resident).map(|g| g.facts.bytes).sum();
        if sum != books.resident_bytes || sum > self.shared.limits.bytes {
            return Err(format!("{} bytes are booked, {sum} are resident, {} allowed", books.resident_bytes, self.shared.limits.bytes));
        }
        for (id, g) in &books.generations {
            if g.leases > 0 && g.delta.is_none() {
                return Err(format!("{id:?} is leased and not resident"));
            }
            if g.delta.as_ref().is_some_and(|d| d.bytes() != g.facts.bytes) {
                return Err(format!("{id:?} is booked with other bytes than it has"));
            }
            let named = |pinned: bool| {
                let points = |a: &&Alias| a.generation == Some(*id) && (!pinned || a.pinned);
                let remembers = |a: &&Alias| !pinned && a.history.iter().any(|(g, _)| g == id);
                books.aliases.values().filter(points).count() + books.aliases.values().filter(remembers).count()
            };
            if (g.names, g.pins) != (named(false), named(true)) {
                return Err(format!("{id:?} is booked with {} names and {} pins, and has others", g.names, g.pins));
            }
            if !g.is_held() && g.names == 0 {
                return Err(format!("{id:?} is kept for nobody"));
            }
        }
        Ok(())
    }
}

impl Books {
    fn show(&self, name: &str, a: &Alias) -> AliasState {
        let generation = a.generation.and_then(|id| self.generations.get(&id));
        AliasState {
            alias: name.to_owned(),
            path: a.source.path.clone(),
            base: a.source.base.to_string(),
            generation: a.generation,
            facts: generation.map(|g| g.facts.clone()),
            resident: generation.is_some_and(|g| g.delta.is_some()),
            pinned: a.pinned,
            created: a.created,
            requests: a.requests,
            leases: generation.map_or(0, |g| g.leases),
            history: a.history.iter().map(|(g, _)| *g).collect(),
        }
    }

    fn may_load(&self, load: &Load) -> Result<(), AdapterError> {
        let known = self.aliases.get(&load.alias);
        // One that was only found in the root, and never read, may be loaded as if it were not there.
        if known.is_some_and(|a| a.generation.is_some() || a.source.trusted) && !load.in_place {
            return Err(AdapterError::Loaded { alias: shown(&load.alias) });
        }
        let now = known.and_then(|a| a.generation);
        match load.expected {
            Some(expected) if now != Some(expected) => Err(AdapterError::Changed {
                alias: shown(&load.alias),
                now: now.map_or_else(|| "none".into(), |g| format!("{:016x}", g.0)),
                expected: format!("{:016x}", expected.0),
            }),
            _ => Ok(()),
        }
    }

    /// Gives an alias what was read for it, unless it was replaced or unloaded meanwhile.
    fn settle(&mut self, alias: &str, source: &Source, expected: Option<AdapterGeneration>, read: Verdict) -> Result<(), AdapterError> {
        let Some(known) = self.aliases.get(alias) else { return Err(AdapterError::Unknown { alias: shown(alias) }) };
        if known.source != *source || known.generation != expected {
            // Whoever waits looks again.
            return Ok(());
        }
        let read = read?;
        if expected.is_none() {
            drop(self.change(alias, |alias| alias.generation = Some(read)));
        }
        Ok(())
    }
}

impl Alias {
    fn new(source: Source) -> Alias {
        Alias { source, generation: None, history: Vec::new(), pinned: false, created: now(), requests: 0 }
    }

    /// The generations it names.
    fn ids(&self) -> impl Iterator<Item = AdapterGeneration> {
        self.generation.into_iter().chain(self.history.iter().map(|(g, _)| *g)).collect::<Vec<_>>().into_iter()
    }

    fn remember(&mut self, generation: AdapterGeneration, source: Source) {
        self.history.retain(|(g, _)| *g != generation);
        self.history.push((generation, source));
        if self.history.len() > HISTORY {
            self.history.remove(0);
        }
    }
}

fn usual_bytes(c: &ModelConfig, held: HeldAs) -> u64 {
    let layer: usize = Site::ALL.iter().map(|s| s.shape(c)).map(|(out, inputs)| 16 * (out + inputs)).sum();
    let element = if held == HeldAs::Bf16 { 2 } else { 4 };
    (c.layers * layer * element) as u64
}

/// Whether a folder looks like an adapter's: PEFT's, or a SORSA checkpoint.
fn holds_adapter(folder: &Path) -> bool {
    if folder.join("adapter_config.json").is_file() {
        return true;
    }
    let config = folder.join("config.json");
    let small = std::fs::metadata(&config).is_ok_and(|m| m.is_file() && m.len() < 1 << 20);
    let text = if small { std::fs::read(&config).unwrap_or_default() } else { Vec::new() };
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    value.get("model_type").and_then(|t| t.as_str()) == Some("sorsa")
}

/// A name an adapter may have.
fn check_name(name: &str, reserved: &[String]) -> Result<(), AdapterError> {
    if name.is_empty() {
        return Err(AdapterError::Name { reason: "an adapter needs a name" });
    }
    if name.len() > NAME_MAX || name.chars().any(|c| c.is_control() || c.is_whitespace() || c == ',') {
        // Metrics list names with commas between.
        return Err(AdapterError::Name { reason: "an adapter's name is at most 256 bytes, without spaces, commas and control characters" });
    }
    if reserved.iter().any(|r| r == name) { Err(AdapterError::NameTaken { alias: name.to_owned() }) } else { Ok(()) }
}

fn shown(name: &str) -> String {
    crate::model::json::shown(name, 80)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
