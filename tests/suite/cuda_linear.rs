//! Products with weights on the device: of many rows, against their definition; those that norm their input themselves, against a norm
//! apart: the same bits.

use std::ffi::c_char;
use std::io::BufRead as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strait::ops::Heads;
use strait::ops::cuda::cublaslt::{Found, Product};
use strait::ops::cuda::linear::{Job, Linears, Mode, Norm};
use strait::ops::cuda::trial::{self, Becomes, Of, Products, Shape};
use strait::ops::cuda::{CudaError, Device, Memory, Own};

use crate::cuda::{device, devices, own_device};
use crate::emulated;

/// Numbers in -1 ..= 1.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, device: &Arc<Device>, n: usize) -> Memory<f32> {
        device.upload(&(0..n).map(|_| self.next()).collect::<Vec<_>>()).unwrap()
    }

    fn halves(&mut self, device: &Arc<Device>, n: usize) -> Memory<u16> {
        device.upload(&(0..n).map(|_| half::bf16::from_f32(self.next()).to_bits()).collect::<Vec<_>>()).unwrap()
    }
}

#[test]
fn products_that_norm_their_rows_give_the_bits_of_a_norm_apart() {
    let device = device();
    let rng = &mut Rng(11);
    for rows in 1..=8 {
        for (inputs, out, mode) in [(64, 40, Mode::F32), (200, 33, Mode::Gated), (1032, 70, Mode::Add), (4104, 20, Mode::Bf16)] {
            let (x, weight) = (rng.floats(&device, rows * inputs), rng.floats(&device, inputs));
            let normed = device.alloc::<u16>(rows * inputs).unwrap();
            let (w, up, bias) = (rng.halves(&device, out * inputs), rng.halves(&device, out * inputs), rng.floats(&device, out));
            let product = |x: u64, norm: Option<Norm>| {
                let y = device.upload(&vec![0.5f32; rows * out]).unwrap();
                let up = if mode == Mode::Gated { [up.ptr(), bias.ptr()] } else { [0; 2] };
                let job = Job { w: [w.ptr(), up[0]], bias: [bias.ptr(), up[1]], y: y.ptr(), out, ldy: out, mode };
                let linears = Linears { jobs: &[job], x, rows, inputs, ldx: inputs, worn: None, norm };
                (linears.norms(&device) || norm.is_none()).then(|| {
                    linears.launch(&device).unwrap();
                    y.to_vec().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
                })
            };
            device.rms_norm(x.all(), rows, weight.all(), 1e-5, normed.all()).unwrap();
            let apart = product(normed.ptr(), None).unwrap();
            let fused = product(x.ptr(), Some(Norm { weight: weight.ptr(), eps: 1e-5 }));
            // Where shared memory holds no rows of this width they are normed apart.
            assert!(fused.is_some() || inputs > 2048, "{rows} rows of {inputs} are normed apart");
            assert!(fused.is_none_or(|fused| fused == apart), "{rows} rows of {inputs}, {mode:?}: other bits");
        }
    }
}

#[test]
fn rows_are_normed_apart_where_their_products_would_lose_a_block() {
    let device = device();
    let jobs = |tiles: usize| [Job { w: [0; 2], bias: [0; 2], y: 0, out: 32 * tiles, ldy: 32 * tiles, mode: Mode::F32 }];
    let norms = |tiles: usize, rows: usize, inputs: usize| {
        Linears { jobs: &jobs(tiles), x: 0, rows, inputs, ldx: inputs, worn: None, norm: None }.norms(&device)
    };
    let many = 8 * device.processors;
    assert!(!norms(many, 9, 64), "so many rows are in two tiles");
    if device.shared == 227 << 10 {
        assert!(norms(many, 1, 4096) && !norms(many, 2, 4096), "three blocks have room for a row each");
        assert!(norms(2 * device.processors, 5, 4096) && !norms(2 * device.processors, 6, 4096), "two blocks have room for five");
        assert!(norms(many, 8, 256) && !norms(many, 8, 512), "three blocks have room for eight short rows");
    }
}

#[test]
fn a_device_runs_those_of_its_own_kernels_that_hold_in_a_trial() {
    for head_dim in [64, 80, 96, 128] {
        let device = own_device();
        assert!([Own::Prefill, Own::Linear, Own::Sealed].into_iter().all(|own| device.runs(own)));
        let heads = Heads { heads: 2, kv_heads: 1, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        for trial in trial::choose(&device, &Shape { heads, matrix: (136, 72), rows: 80, history: 70, decoded: (1, 9) }).unwrap() {
            assert!(trial.off < 1.0, "{head_dim} channels: {trial}");
            // Times of an emulated device tell nothing.
            let Of::Own(own) = trial.of else { panic!("no library was opened: {trial}") };
            assert_eq!(device.runs(own), trial.holds(), "{trial}");
        }
    }
    // More heads than fill a tile of lines, and latents of more than one: what is asked is what a model asks, and both ways give numbers.
    let device = own_device();
    let heads = Heads { heads: 20, kv_heads: 5, head_dim: 64, scale: 0.125 };
    for trial in trial::choose(&device, &Shape { heads, matrix: (136, 72), rows: 66, history: 10, decoded: (1, 9) }).unwrap() {
        assert!(trial.off < 1.0, "{trial}");
    }
    // Kernels that compute nothing are found, each by itself.
    if let Some(emulated) = emulated::EMULATED.get() {
        for (spoilt, of) in [(c"prefill_wg_", Own::Prefill), (c"linear_wg_", Own::Linear), (c"attend_sealed_wg_", Own::Sealed)] {
            let device = own_device();
            let stream = device.stream().cu_stream() as usize;
            // SAFETY: a function of the emulated driver, of this type, which copies the name.
            unsafe {
                emulated.get::<unsafe extern "C" fn(usize, *const c_char)>(b"strait_emulated_spoil").unwrap()(stream, spoilt.as_ptr())
            };
            let heads = Heads { heads: 2, kv_heads: 1, head_dim: 64, scale: 0.125 };
            let trials = trial::choose(&device, &Shape { heads, matrix: (136, 72), rows: 80, history: 70, decoded: (1, 9) }).unwrap();
            for trial in &trials {
                assert_eq!(trial.off.is_infinite(), trial.of == Of::Own(of), "{trial}");
            }
            assert!(trials.len() == 3 && !device.runs(of));
        }
    }
    // What has none of its own has nothing to try, and goes on without.
    let [_, common] = devices();
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 64, scale: 0.125 };
    assert!(trial::choose(&common, &Shape { heads, matrix: (8, 8), rows: 65, history: 0, decoded: (1, 1) }).unwrap().is_empty());
    assert!([Own::Sealed, Own::Prefill, Own::Linear].into_iter().all(|own| !common.runs(own)));
}

#[test]
fn products_of_many_rows_are_those_of_the_definition() {
    let rng = &mut Rng(12);
    // Tiles of 256 outputs and of 128, by processors few and many, and beyond their edges.
    let cases = [(65, 72, 300, Mode::F32), (129, 64, 8300, Mode::Gated), (200, 136, 130, Mode::Add), (300, 200, 1048, Mode::Bf16)];
    for (rows, inputs, out, mode) in cases {
        let mut halves = |n: usize| (0..n).map(|_| half::bf16::from_f32(rng.next())).collect::<Vec<_>>();
        let (x, w) = (halves(rows * inputs), [halves(out * inputs), halves(out * inputs)]);
        let bias = [0.25f32, -0.75].map(|b| vec![b; out]);
        for device in devices() {
            let upload = |of: &[half::bf16]| device.upload(&of.iter().map(|v| v.to_bits()).collect::<Vec<_>>()).unwrap();
            let (on, weights) = (upload(&x), [upload(&w[0]), upload(&w[1])]);
            let biases = [device.upload(&bias[0]).unwrap(), device.upload(&bias[1]).unwrap()];
            let y = device.upload(&vec![0.5f32; rows * out]).unwrap();
            let second = if mode == Mode::Gated { [weights[1].ptr(), biases[1].ptr()] } else { [0; 2] };
            let job = Job { w: [weights[0].ptr(), second[0]], bias: [biases[0].ptr(), second[1]], y: y.ptr(), out, ldy: out, mode };
            Linears { jobs: &[job], x: on.ptr(), rows, inputs, ldx: inputs, worn: None, norm: None }.launch(&device).unwrap();
            let y = y.to_vec().unwrap();
            for row in 0..rows {
                for o in (row % 13..out).step_by(13).chain([out - 1]) {
                    let sum = |of: usize| {
                        let pairs = x[row * inputs..][..inputs].iter().zip(&w[of][o * inputs..][..inputs]);
                        pairs.map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum::<f64>() + f64::from(bias[of][o])
                    };
                    let at = row * out + o;
                    let short = half::bf16::from_bits((y[at / 2].to_bits() >> (16 * (at % 2))) as u16).to_f32();
                    let (want, got) = match mode {
                        Mode::F32 => (sum(0), y[at]),
                        Mode::Add => (sum(0) + 0.5, y[at]),
                        Mode::Bf16 => (sum(0), short),
                        Mode::Gated => (sum(0) / (1.0 + (-sum(0)).exp()) * sum(1), short),
                    };
                    let near = (f64::from(got) - want).abs() < 1e-3 + want.abs() / 128.0;
                    let by = if device.runs(Own::Linear) { "warpgroups" } else { "warps" };
                    assert!(near, "{rows} rows of {inputs}, {mode:?}, by {by}: y[{row}][{o}] is {got}, not {want}");
                }
            }
        }
    }
}

/// A device of its own with the library open, which is this test's alone: what one spoils, no other meets. Nothing where a real machine has
/// no library.
pub(crate) fn with_library() -> Option<(Arc<Device>, MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = own_device();
    let found = device.open_library().unwrap();
    let version = matches!(found, Found::Version(120_000..));
    assert!(version || emulated::CUBLASLT.get().is_none(), "{found}");
    version.then_some((device, alone))
}

/// Has the emulated library do what a test is about until this is dropped.
struct Spoilt;

impl Spoilt {
    fn set(how: i32) -> Option<Self> {
        // SAFETY: a function of the emulated library, of this type.
        emulated::CUBLASLT
            .get()
            .map(|lt| unsafe { lt.get::<unsafe extern "C" fn(i32)>(b"strait_emulated_spoil_library").unwrap()(how) })
            .map(|()| Spoilt)
    }
}

impl Drop for Spoilt {
    fn drop(&mut self) {
        std::mem::forget(Spoilt::set(0));
    }
}

#[test]
fn products_by_the_library_are_those_of_own_kernels() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    let rng = &mut Rng(13);
    let (inputs, outs) = (136, [(72, true), (40, false), (40, true)]);
    for (becomes, mode, biased) in [(Becomes::Outputs, Mode::F32, true), (Becomes::Sum, Mode::Add, false)] {
        let outs = outs.map(|(out, bias)| (out, bias && biased));
        let launch = Products { what: "", inputs, becomes, outs: outs.to_vec() }.launch().unwrap();
        assert!(device.give_to_library(&launch, 300));
        for rows in [64, 65, 200, 300, 301] {
            let (x, weights) = (rng.halves(&device, rows * inputs), outs.map(|(out, _)| rng.halves(&device, out * inputs)));
            let biases = outs.map(|(out, biased)| biased.then(|| rng.floats(&device, out)));
            // Rows with room between them.
            let run = |by_library: bool| {
                let y = outs.map(|(out, _)| device.upload(&vec![0.5f32; rows * (out + 8)]).unwrap());
                let job = |i: usize| {
                    let bias = [biases[i].as_ref().map_or(0, Memory::ptr), 0];
                    Job { w: [weights[i].ptr(), 0], bias, y: y[i].ptr(), out: outs[i].0, ldy: outs[i].0 + 8, mode }
                };
                let jobs = [job(0), job(1), job(2)];
                let linears = Linears { jobs: &jobs, x: x.ptr(), rows, inputs, ldx: inputs, worn: None, norm: None };
                assert_eq!(linears.by_library(&device), by_library, "{rows} rows");
                linears.launch(&device).unwrap();
                y.map(|y| y.to_vec().unwrap())
            };
            let library = run((65..=300).contains(&rows));
            device.take_from_library(&launch);
            for (library, own) in library.iter().zip(&run(false)) {
                let near = library.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-4);
                assert!(near, "{rows} rows, {mode:?}");
            }
            assert!(device.give_to_library(&launch, 300));
        }
        // Others are not its.
        let none =
            |jobs: &[Job], inputs, worn| Linears { jobs, x: 0, rows: 100, inputs, ldx: inputs, worn, norm: None }.by_library(&device);
        let job = |(out, biased): (usize, bool), mode| Job { w: [0; 2], bias: [u64::from(biased) * 256, 0], y: 0, out, ldy: out, mode };
        // Added or not, they are the same to it; but for a bias beside what is there.
        assert!(none(&outs.map(|out| job(out, Mode::F32)), inputs, None));
        assert_eq!(none(&outs.map(|out| job(out, Mode::Add)), inputs, None), !biased);
        let sum = Products { what: "", inputs, becomes: Becomes::Sum, outs: outs.to_vec() };
        assert_eq!(sum.launch().is_some(), !biased);
        assert!(!none(&outs.map(|out| job(out, mode)), inputs + 8, None), "other inputs");
        assert!(!none(&outs.map(|out| job(out, Mode::Bf16)), inputs, None), "another kind");
        assert!(!none(&[job(outs[0], mode)], inputs, None), "one of them");
        assert!(!none(&outs.map(|(out, biased)| job((out, !biased), mode)), inputs, None), "other biases");
    }
    // What it does not compute it does not take.
    let bf16 = [Product { out: 64, inputs: 64, wide: false, biased: true }];
    assert!(!device.give_to_library(&bf16, 100));
    let bf16 = [Product { biased: false, ..bf16[0] }];
    assert!(device.give_to_library(&bf16, 100));
}

#[test]
fn the_library_is_given_what_it_computes_sooner_and_in_one_order() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    let of = |what, inputs, becomes, outs: &[(usize, bool)]| Products { what, inputs, becomes, outs: outs.to_vec() };
    let launches = [
        of("a", 64, Becomes::Outputs, &[(128, true), (64, true), (64, false)]),
        of("b", 128, Becomes::Sum, &[(64, false)]),
        of("c", 64, Becomes::Gated, &[(160, true), (160, true)]),
        of("d", 160, Becomes::Sum, &[(64, true)]),
    ];
    let serves = |of: &Products, rows| {
        let mode = if of.becomes == Becomes::Sum { Mode::Add } else { Mode::F32 };
        let jobs: Vec<Job> =
            of.outs.iter().map(|&(out, b)| Job { w: [0; 2], bias: [u64::from(b), 0], y: 0, out, ldy: out, mode }).collect();
        Linears { jobs: &jobs, x: 0, rows, inputs: of.inputs, ldx: of.inputs, worn: None, norm: None }.by_library(&device)
    };
    assert!(trial::choose_library(&device, &launches, 64).unwrap().is_empty(), "so few rows never ask");
    let trials = trial::choose_library(&device, &launches, 192).unwrap();
    assert_eq!(trials.len(), 3, "a bias is not added to what is there");
    for (trial, of) in trials.iter().zip(&launches) {
        // Times of an emulated device tell nothing.
        assert!(trial.of == Of::Library && trial.off < 1.0 && trial.own_ms.is_finite(), "{trial}");
        for rows in [65, 192] {
            assert_eq!(serves(of, rows), trial.holds(), "{trial}");
        }
        assert!(!serves(of, 193), "so many rows were not tried");
    }
    // Of what it does wrong nothing is given to it: nothing computed, an order that depends on other rows, odd rows without an algorithm, nothing
    // recorded.
    for how in [1, 2, 3, 4] {
        let Some(_spoilt) = Spoilt::set(how) else { return };
        // Of rows that it was not asked about before.
        let rows = 192 + how as usize;
        for (trial, of) in trial::choose_library(&device, &launches, rows).unwrap().iter().zip(&launches) {
            assert!(!trial.holds() && !serves(of, rows), "{how}: {trial}");
            assert_eq!(how >= 3, trial.own_ms.is_infinite(), "{how}: {trial}");
        }
    }
    assert!(trial::choose_library(&own_device(), &launches, 192).unwrap().is_empty(), "not open there");
}

/// One product of many rows with weights at random, by the library, without a bias.
fn by_library(device: &Arc<Device>, rows: usize, (out, inputs): (usize, usize)) -> Result<Vec<u32>, CudaError> {
    let rng = &mut Rng(14);
    let (x, w, y) = (rng.halves(device, rows * inputs), rng.halves(device, out * inputs), device.alloc::<f32>(rows * out).unwrap());
    let job = Job { w: [w.ptr(), 0], bias: [0; 2], y: y.ptr(), out, ldy: out, mode: Mode::F32 };
    let linears = Linears { jobs: &[job], x: x.ptr(), rows, inputs, ldx: inputs, worn: None, norm: None };
    assert!(linears.by_library(device));
    linears.launch(device)?;
    Ok(y.to_vec()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn the_algorithm_that_was_tried_is_the_one_that_is_used() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    let Some(_spoilt) = Spoilt::set(5) else { return };
    let launch = [Product { out: 72, inputs: 136, wide: true, biased: false }];
    assert!(device.give_to_library(&launch, 200));
    let tried = by_library(&device, 150, (72, 136)).unwrap();
    device.take_from_library(&launch);
    assert!(device.give_to_library(&launch, 200));
    assert!(by_library(&device, 150, (72, 136)).unwrap() == tried, "another algorithm");
    // The emulated library has another one by now.
    assert!(device.give_to_library(&launch, 201));
    assert!(by_library(&device, 150, (72, 136)).unwrap() != tried, "not asked for other rows");
}

#[test]
fn the_library_is_asked_in_the_context_that_it_was_opened_in() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    if Device::count().unwrap() < 2 {
        return eprintln!("this machine has one device");
    }
    let other = Device::open(1).unwrap();
    let launch = [Product { out: 64, inputs: 64, wide: true, biased: false }];
    // Whatever asks a device for memory binds its context.
    let _there = other.alloc::<u8>(1).unwrap();
    assert!(device.give_to_library(&launch, 100));
    let (x, w, y) = (device.alloc::<u16>(80 * 64).unwrap(), device.alloc::<u16>(64 * 64).unwrap(), device.alloc::<f32>(80 * 64).unwrap());
    let job = Job { w: [w.ptr(), 0], bias: [0; 2], y: y.ptr(), out: 64, ldy: 64, mode: Mode::F32 };
    let _there = other.alloc::<u8>(1).unwrap();
    Linears { jobs: &[job], x: x.ptr(), rows: 80, inputs: 64, ldx: 64, worn: None, norm: None }.launch(&device).unwrap();
    device.wait().unwrap();
}

#[test]
fn a_product_that_the_library_refuses_on_a_lost_device_says_that_it_is_lost() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    let Some(emulated) = emulated::EMULATED.get() else { return };
    let launch = [Product { out: 72, inputs: 136, wide: true, biased: false }];
    assert!(device.give_to_library(&launch, 100));
    let refused = device.record(|| {
        let _spoilt = Spoilt::set(4);
        by_library(&device, 80, (72, 136)).map(drop)
    });
    assert!(matches!(refused, Err(CudaError::Library(_))), "a recording is of a device that goes on");
    by_library(&device, 80, (72, 136)).unwrap();
    // SAFETY: a function of the emulated driver, of this type.
    unsafe { emulated.get::<unsafe extern "C" fn(usize, i32)>(b"strait_emulated_lose").unwrap()(device.stream().cu_stream() as usize, 0) };
    let refused = by_library(&device, 80, (72, 136)).unwrap_err();
    assert!(refused.is_lost(), "{refused}");
}

#[test]
fn a_library_without_what_is_asked_of_it_is_left_alone() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(driver) = maps.lines().find_map(|line| line.split_once("/").filter(|(_, at)| at.contains("/emulated-driver-"))) else {
        return;
    };
    let dir = std::env::temp_dir().join(format!("strait-cublaslt-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::os::unix::fs::symlink(format!("/{}", driver.1), dir.join("libcuda.so")).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let empty = ["-shared", "-fPIC", "-x", "c++", "/dev/null", "-o"];
    assert!(Command::new(compiler).args(empty).arg(dir.join("libcublasLt.so")).status().unwrap().success());
    let mut server = Command::new(env!("CARGO_BIN_EXE_strait"));
    server.args(["serve", "--port", "0", "--device", "cuda"]).env("LD_LIBRARY_PATH", &dir);
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(server.stderr.take().unwrap()).read_line(&mut line).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    assert!(line.contains("cuBLASLt does not start (it has no cublasLtGetVersion)"), "{line}");
}
