//! Devices unlike an H200, as the emulated driver has them: less shared memory, less memory, an architecture the image has no code of. And
//! what must not depend on which device it is.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strait::model::delta::Site;
use strait::ops::cuda::{CudaError, Device};

use crate::cuda::{device, own_device};
use crate::cuda_adapters::{Numbers, id, on, open, step};
use crate::emulated;

/// Of the emulated driver: a small card, and a later architecture. Nothing on a real machine. A test has them for itself, as what is free there
/// is measured.
fn others() -> Option<([Arc<Device>; 2], MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    device();
    emulated::EMULATED.get().map(|_| ([1, 2].map(|n| Device::open(n).unwrap()), ALONE.lock().unwrap_or_else(PoisonError::into_inner)))
}

#[test]
fn rows_that_wear_adapters_say_the_same_on_any_device() {
    let Some((others, _alone)) = others() else { return eprintln!("a real machine has the devices it has") };
    let checkpoint = open("llama-bias");
    let mut numbers = Numbers(5);
    let delta = Arc::new(numbers.plain(&checkpoint.config, &Site::ALL, 9));
    for n in [1, 8, 20, 33, 40, 64] {
        let prompt: Vec<u32> = (0..n).map(|t| (t * 31 + 7) % 250).collect();
        let said = |device: Arc<Device>| {
            let mut on = on(device, checkpoint, (64, delta.bytes() * 2));
            // As launches, recorded, and replayed.
            (0..3).map(|_| step(&mut on, &[(&prompt, id(1))], &[(id(1), &delta)])).collect::<Vec<_>>()
        };
        // Those of one architecture alone round elsewhere.
        let want = said(Device::open_common(0).unwrap());
        for other in &others {
            let name = other.describe();
            let got = said(other.clone());
            for (got, want) in got.iter().zip(&want) {
                assert!((0..n).all(|at| got.0[&(0, at)] == want.0[&(0, at)]), "{n} rows on {name}");
            }
        }
    }
}

#[test]
fn a_step_takes_no_memory_that_was_not_reserved() {
    let checkpoint = open("llama-bias");
    let Some(([small, _], _alone)) = others() else { return eprintln!("others share the memory of a real device") };
    let prompt: Vec<u32> = (0..64).collect();
    let rows: Vec<(&[u32], _)> = (0..16).map(|_| (&prompt[..], id(0))).collect();
    let grown = |tokens: usize| {
        let mut on = on(small.clone(), checkpoint, (tokens, 0));
        let before = small.memory().unwrap().0;
        step(&mut on, &rows, &[]);
        before - small.memory().unwrap().0
    };
    let (reserved, not) = (grown(64 * 16), grown(64));
    assert!(reserved < 1 << 20 && not > 2 << 20, "{reserved} bytes for a step that was expected, {not} for another");
}

#[test]
fn launches_of_many_rows_fit_every_grid() {
    let device = own_device();
    let (rows, width) = (65_536, 8);
    let ones = device.upload(&vec![1.0f32; rows * width]).unwrap();
    let out = device.alloc::<u16>(rows * width).unwrap();
    device.silu_mul(ones.all(), ones.all(), width, out.all()).unwrap();
    let silu = half::bf16::from_f32(1.0 / (1.0 + (-1.0f32).exp())).to_bits();
    assert!(out.to_vec().unwrap().iter().all(|&x| x == silu));
}

/// Whatever frees memory waits for the stream, which spoils what is recorded there meanwhile. That is no loss of the device.
#[test]
fn a_recording_that_was_disturbed_is_not_a_lost_device() {
    let device = own_device();
    let ones = device.upload(&[1.0f32; 64]).unwrap();
    let out = device.alloc::<u16>(64).unwrap();
    let work = || device.silu_mul(ones.all(), ones.all(), 8, out.all());
    let other = device.alloc::<u8>(16).unwrap();
    let disturbed = device.record(|| {
        std::thread::scope(|scope| scope.spawn(|| drop(other)).join().unwrap());
        work()
    });
    match disturbed {
        Err(e @ CudaError::Device(_)) => assert!(!e.is_lost(), "{e}"),
        Err(e @ CudaError::Launch { .. }) => assert!(!e.is_lost(), "{e}"),
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("it was disturbed"),
    }
    device.record(work).unwrap().launch().unwrap();
    device.wait().unwrap();
}

/// Each has its own stream in the one context there is of a device: opening it again waits for nobody who is there already.
#[test]
fn a_device_is_opened_while_others_record() {
    let device = own_device();
    let ones = device.upload(&[1.0f32; 64]).unwrap();
    let out = device.upload(&[0u16; 64]).unwrap();
    let open = || std::thread::scope(|scope| scope.spawn(|| Device::open(device.ordinal())).join().unwrap());
    let mut other = None;
    let recorded = device.record(|| {
        other = Some(open());
        device.silu_mul(ones.all(), ones.all(), 8, out.all())
    });
    other.unwrap().unwrap();
    recorded.unwrap().launch().unwrap();
    assert!(out.to_vec().unwrap().iter().all(|&x| x != 0));
}

/// What a driver does with a graph whose kernels are gone is not said: a decoder drops its device before what it has recorded.
#[test]
fn what_was_recorded_outlives_its_device() {
    let device = own_device();
    let ones = device.upload(&[1.0f32; 64]).unwrap();
    let out = device.upload(&[0u16; 64]).unwrap();
    let recorded = device.record(|| device.silu_mul(ones.all(), ones.all(), 8, out.all())).unwrap();
    recorded.launch().unwrap();
    assert!(out.to_vec().unwrap().iter().all(|&x| x != 0));
    drop((ones, out));
    assert_eq!(Arc::strong_count(&device), 1);
    drop(device);
    drop(recorded);
}

/// Who catches a panic goes on with the device: the stream does not record what is asked of it from then on.
#[test]
fn a_recording_that_panicked_has_ended() {
    let device = own_device();
    let ones = device.upload(&[1.0f32; 64]).unwrap();
    let out = device.upload(&[0u16; 64]).unwrap();
    let work = || device.silu_mul(ones.all(), ones.all(), 8, out.all());
    let panics = || {
        work()?;
        panic!("in the middle of it")
    };
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| device.record(panics)));
    assert!(caught.is_err());
    assert!(out.to_vec().unwrap().iter().all(|&x| x == 0), "what was recorded was not run");
    work().unwrap();
    let silu = half::bf16::from_f32(1.0 / (1.0 + (-1.0f32).exp())).to_bits();
    assert!(out.to_vec().unwrap().iter().all(|&x| x == silu), "what is asked for afterwards is done");
    device.record(work).unwrap().launch().unwrap();
    device.wait().unwrap();
}

/// A driver need not have read what it is to copy when it returns.
#[test]
fn what_was_written_is_the_callers_again() {
    let device = own_device();
    let mut data = vec![1u32; 1000];
    let mut memory = device.upload(&data).unwrap();
    data.fill(2);
    memory.write(500, &data[..500]).unwrap();
    data.fill(3);
    let there = memory.to_vec().unwrap();
    assert!(there[..500].iter().all(|&x| x == 1) && there[500..].iter().all(|&x| x == 2));
    // More than is kept for a driver that reads later.
    let mut data = vec![4u8; 9 << 20];
    let memory = device.upload(&data).unwrap();
    data.fill(5);
    assert!(memory.to_vec().unwrap().iter().all(|&x| x == 4));
}

/// That kernels wait for those ahead of them is what these tests see: one that does not is found out.
#[test]
fn a_launch_that_does_not_wait_is_found_out() {
    device();
    let Some(emulated) = emulated::EMULATED.get() else { return eprintln!("a real device need not overlap them") };
    let norm = |hurried: bool| {
        let device = own_device();
        let (rows, width) = (3, 64);
        let (from, weight) = (device.upload(&vec![2.0f32; rows * width]).unwrap(), device.upload(&vec![1.0f32; width]).unwrap());
        let (x, out) = (device.upload(&vec![0.0f32; rows * width]).unwrap(), device.alloc::<u16>(rows * width).unwrap());
        let all = device.upload(&[0u32, 1, 2]).unwrap();
        if hurried {
            let stream = device.stream().cu_stream() as usize;
            // SAFETY: a function of the emulated driver, of this type, which copies the name.
            unsafe {
                emulated.get::<unsafe extern "C" fn(usize, *const c_char)>(b"strait_emulated_hurry").unwrap()(stream, c"rms_norm".as_ptr())
            };
        }
        device.pick(from.all(), all.all(), width, x.all()).unwrap();
        device.rms_norm(x.all(), rows, weight.all(), 0.0, out.all()).unwrap();
        out.to_vec().unwrap()
    };
    let one = half::bf16::ONE.to_bits();
    assert!(norm(false).iter().all(|&x| x == one));
    assert!(norm(true).iter().any(|&x| x != one));
}
