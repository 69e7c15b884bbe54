//! A device, its memory, and launches of kernels by name.
//!
//! One stream carries everything in order, but for what a [`Copier`] brings beside it. Memory is freed once what was asked of the stream
//! before is done.

use std::collections::HashMap;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaStream, result};

use super::CudaError;
use super::cublaslt::{CublasLt, Found, Product};
use super::linear::Linears;

/// All kernels for all architectures: `kernels/build.py` makes it.
static IMAGE: &[u8] = include_bytes!("../../../kernels/strait.fatbin");

/// Least driver that runs the image, which CUDA 13.0's compiler made.
const LEAST_DRIVER: i32 = 13_000;

/// Kernels of one architecture alone, by what they are for; each does what kernels of all architectures do too. Hopper has them, for its
/// products of warpgroups.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Own {
    /// Decoded positions over words of codes (`warpgroup.cuh`).
    Sealed,
    /// Chunks of queries (`prefill_wg.cuh`).
    Prefill,
    /// Products of many rows (`linear_wg.cuh`).
    Linear,
}

/// A device with its kernels loaded.
pub struct Device {
    /// Where it was asked for and is at hand. It goes before the context it was made in.
    library: OnceLock<CublasLt>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: Arc<Module>,
    /// Kernels asked for so far, and the shared memory each was last allowed.
    kernels: Mutex<HashMap<&'static str, Kernel>>,
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of shared memory a block may ask for.
    pub shared: usize,
    /// Whether a kernel may begin before the one ahead of it has ended.
    overlaps: bool,
    /// Whether the launch ahead is one of the library's.
    behind_library: AtomicBool,
    /// Which kernels of its own architecture run on it.
    own: [AtomicBool; 3],
    /// What was written since the stream was waited for last, where it is copied from.
    sent: Mutex<Sent>,
}

#[derive(Default)]
struct Sent {
    kept: Vec<Box<[u8]>>,
    bytes: usize,
}

/// Bytes that are kept for copies to read at their leisure; for more the stream is waited for.
const KEPT: usize = 8 << 20;

#[derive(Clone, Copy)]
struct Kernel {
    function: CUfunction,
    shared: u32,
}

// SAFETY: a function handle belongs to its module, which the device keeps, and may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: handles of the driver are used by any thread that has the context bound, and everything here binds it first.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Drop for Device {
    fn drop(&mut self) {
        // What it holds is given back next.
        let _ = self.context.bind_to_thread();
        let _ = self.stream.synchronize();
    }
}

/// Code on a device. It stays there as long as anything that was recorded names it.
struct Module {
    context: Arc<CudaContext>,
    handle: sys::CUmodule,
}

// SAFETY: a module's handle may be used from any thread that has the context bound.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: loaded once, unloaded once, after all that was launched: the device has waited for its stream.
        let _ = unsafe { result::module::unload(self.handle) };
    }
}

impl Device {
    /// Devices of this machine; none where there is no driver.
    ///
    /// # Errors
    /// Where there is a driver and it fails.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: loading the driver runs its own initialisers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        result::init().map_err(|e| CudaError::NoDevice(e.to_string()))?;
        Ok(result::device::get_count()? as usize)
    }

    /// Opens device `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// Each with its mend: no driver, no such device, too old a driver or device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        Self::open_with(ordinal, true)
    }

    /// As [`Device::open`], without the kernels of one architecture alone: what any device runs, to be tested and measured on one that
    /// has better.
    ///
    /// # Errors
    /// As it has.
    pub fn open_common(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        Self::open_with(ordinal, false)
    }

    fn open_with(ordinal: usize, own: bool) -> Result<Arc<Self>, CudaError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { asked: ordinal, count });
        }
        let mut version = 0;
        // SAFETY: a valid place for the answer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
        if version < LEAST_DRIVER {
            return Err(CudaError::OldDriver { version });
        }
        let context = CudaContext::new(ordinal)?;
        let capability = context.compute_capability()?;
        if capability.0 < 8 {
            return Err(CudaError::OldDevice { name: context.name()?, capability });
        }
        // Its first stream would wait for the context otherwise, all of it: for other users of the device in this process too, and while any of
        // them records that is refused, and spoils the recording.
        // SAFETY: that is for memory of the crate's own, which is not used here.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        // SAFETY: the context is bound to this thread; the image is a whole one and outlives the module.
        let handle = unsafe { result::module::load_data(IMAGE.as_ptr().cast()) }.map_err(CudaError::Image)?;
        let module = Arc::new(Module { context: context.clone(), handle });
        let processors = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // Kernels wait for the launch ahead only where they were compiled for an architecture that can (`grid_wait`): what the driver makes of
        // the image's PTX, for one it has no code of, cannot.
        // SAFETY: a kernel of the module that was loaded.
        let compiled_for = unsafe {
            let function = result::module::get_function(handle, c"merge".to_owned())?;
            result::function::get_function_attribute(function, CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?
        };
        Ok(Arc::new(Device {
            library: OnceLock::new(),
            context,
            stream,
            module,
            kernels: Mutex::default(),
            processors,
            shared,
            overlaps: compiled_for >= 90,
            behind_library: AtomicBool::new(false),
            own: [(); 3].map(|()| AtomicBool::new(own && capability.0 == 9)),
            sent: Mutex::default(),
        }))
    }

    /// Whether these kernels run on it, and not those of all architectures.
    pub fn runs(&self, own: Own) -> bool {
        self.own[own as usize].load(Ordering::Relaxed)
    }

    /// Whether launches may begin before the ones ahead have ended: what the driver says its code was compiled for decides.
    pub fn overlaps(&self) -> bool {
        self.overlaps
    }

    /// Runs these kernels, on a device of their architecture, or those of all architectures. What was made for launches before may go on as it was.
    pub(super) fn choose(&self, own: Own, runs: bool) {
        self.own[own as usize].store(runs, Ordering::Relaxed);
    }

    /// Starts the library of products, where it is on this machine; nothing is given to it yet. To be called once.
    ///
    /// Cost: some tenths of a second, its workspace, and what it takes of the device for itself.
    ///
    /// # Errors
    /// Where the device fails; not where there is no library, or one that does not start.
    pub fn open_library(&self) -> Result<Found, CudaError> {
        self.context.bind_to_thread()?;
        match CublasLt::open() {
            Ok((library, found)) => {
                assert!(self.library.set(library).is_ok(), "opened once");
                Ok(found)
            }
            Err(found) => Ok(found),
        }
    }

    /// The library, where it was opened.
    pub(super) fn library(&self) -> Option<&CublasLt> {
        self.library.get()
    }

    /// Gives launches of these products to the library, of many rows up to so many. Whether it takes them: not where it has no algorithm for one,
    /// or was not opened.
    pub fn give_to_library(&self, launch: &[Product], rows: usize) -> bool {
        let bound = self.library.get().filter(|_| self.context.bind_to_thread().is_ok());
        bound.is_some_and(|library| library.give(launch, rows))
    }

    /// Has these launches by this program's own kernels again. What was recorded before may go on as it was.
    pub fn take_from_library(&self, launch: &[Product]) {
        if let Some(library) = self.library.get() {
            library.take_back(launch);
        }
    }

    /// Asks the stream for products that the library has.
    pub(super) fn launch_by(&self, library: &CublasLt, linears: &Linears<'_>) -> Result<(), CudaError> {
        self.context.bind_to_thread()?;
        self.behind_library.store(true, Ordering::Relaxed);
        library.launch(self.stream.cu_stream(), linears).map_err(|refused| {
            // It refuses what a lost device would. A stream that is recorded to is not to be waited for: what it does is asked for once more.
            let recorded = !matches!(self.stream.capture_status(), Ok(sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE));
            match if recorded { Ok(()) } else { self.stream.synchronize() } {
                Err(lost) => lost.into(),
                Ok(()) => refused.into(),
            }
        })
    }

    /// Its number among the devices of this machine.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Its name and compute capability, for logs.
    pub fn describe(&self) -> String {
        let name = self.context.name().unwrap_or_else(|e| e.to_string());
        let (major, minor) = self.context.compute_capability().unwrap_or((0, 0));
        format!("{name}, compute capability {major}.{minor}, {} multiprocessors", self.processors)
    }

    /// Bytes free and in all.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        Ok(self.context.mem_get_info()?)
    }

    /// Bytes of the device, as they were before.
    ///
    /// # Errors
    /// Where there are not so many.
    pub fn alloc<T: Pod>(self: &Arc<Self>, n: usize) -> Result<Memory<T>, CudaError> {
        self.context.bind_to_thread()?;
        let bytes = (n * size_of::<T>()).max(1);
        // SAFETY: the context is bound.
        let at = unsafe { result::malloc_sync(bytes) }.map_err(|e| match (e.0, self.context.mem_get_info()) {
            (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => CudaError::NoMemory { bytes, free, total },
            _ => e.into(),
        })?;
        Ok(Memory { device: self.clone(), at, n, of: PhantomData })
    }

    /// A copy of `data` on the device.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn upload<T: Pod>(self: &Arc<Self>, data: &[T]) -> Result<Memory<T>, CudaError> {
        let mut memory = self.alloc(data.len())?;
        memory.write(0, data)?;
        Ok(memory)
    }

    /// Launches a kernel whose one parameter is `args`, which must be what it takes.
    ///
    /// # Safety
    /// Pointers in `args` point to what the kernel reads and writes, until it is done.
    ///
    /// # Errors
    /// Where the device refuses the launch.
    pub unsafe fn launch<A: Copy>(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let fault = |source| CudaError::Launch { kernel, source };
        self.context.bind_to_thread()?;
        let function = self.kernel(kernel, shared as u32).map_err(fault)?;
        // When the library's launches let the next one begin, and what they have waited for by then, is not ours to know.
        let overlaps = self.overlaps && !self.behind_library.swap(false, Ordering::Relaxed);
        let mut parameters = [std::ptr::from_ref(args).cast::<c_void>().cast_mut()];
        let [x, y, z] = grid.map(|n| n as u32);
        // SAFETY: a union of plain numbers, zero where nothing is said.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(overlaps),
        };
        // SAFETY: the function takes one parameter of this type, as the caller promises, and parameters are copied by the call. Every
        // kernel of ours waits for the one before it, but for reading weights and what the host uploaded, which no kernel writes.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters.as_mut_ptr(), std::ptr::null_mut()) }.result().map_err(fault)
    }

    /// A kernel that may have so much shared memory.
    fn kernel(&self, name: &'static str, shared: u32) -> Result<CUfunction, cudarc::driver::DriverError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match kernels.get_mut(name) {
            Some(kernel) => kernel,
            None => {
                let text = std::ffi::CString::new(name).expect("names of kernels have no zeros");
                // SAFETY: the module is loaded, and the device keeps it.
                let function = unsafe { result::module::get_function(self.module.handle, text) }?;
                kernels.entry(name).or_insert(Kernel { function, shared: 48 << 10 })
            }
        };
        if shared > kernel.shared {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this module.
            unsafe { result::function::set_function_attribute(kernel.function, attribute, shared as i32) }?;
            kernel.shared = shared;
        }
        Ok(kernel.function)
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// Where any of it failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        let before = std::mem::take(&mut *self.sent());
        let done = self.stream.synchronize();
        if done.is_err() {
            let mut sent = self.sent();
            sent.kept.extend(before.kept);
            sent.bytes += before.bytes;
        }
        Ok(done?)
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds the device takes for `work`, which is recorded once and then run `times` over, and once before.
    ///
    /// # Errors
    /// Those of the work, and where the device fails.
    pub fn time(&self, times: usize, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let graph = self.record(work)?;
        graph.launch()?;
        let start = self.event()?;
        (0..times).try_for_each(|_| graph.launch())?;
        let end = self.event()?;
        self.wait()?;
        Ok(f64::from(start.elapsed_ms(&end)?) / times as f64)
    }

    /// What `work` asks of the stream, to be asked again at the cost of one launch.
    ///
    /// # Errors
    /// Those of the work, and where the device cannot record it.
    pub fn record(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Recording, CudaError> {
        self.context.bind_to_thread()?;
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let capture = Capture(&self.stream);
        let done = work();
        // What went wrong first may have spoilt the recording, and is what there is to tell.
        let graph = capture.end();
        done?;
        Ok(Recording { graph: graph?, module: self.module.clone() })
    }

    fn event(&self) -> Result<cudarc::driver::CudaEvent, CudaError> {
        Ok(self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))?)
    }

    /// The stream everything runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// Host memory that the device copies to and from at full speed, without a stop in between.
pub struct Pinned<T> {
    device: Arc<Device>,
    at: *mut T,
    n: usize,
}

// SAFETY: plain memory that is its own.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.device.context.bind_to_thread();
        let _ = self.device.stream.synchronize();
        // SAFETY: allocated by the driver, freed once.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}

impl<T: Pod> Pinned<T> {
    /// `n` zeros.
    ///
    /// # Errors
    /// Where the system has no such memory left.
    pub fn new(device: &Arc<Device>, n: usize) -> Result<Self, CudaError> {
        device.context.bind_to_thread()?;
        // SAFETY: the context is bound; what is allocated is written before it is read.
        let at = unsafe { result::malloc_host((n * size_of::<T>()).max(1), 0) }?.cast::<T>();
        // SAFETY: so many elements were allocated.
        unsafe { std::ptr::write_bytes(at, 0, n) };
        Ok(Pinned { device: device.clone(), at, n })
    }

    /// Grows to at least `n` elements; what it held is lost.
    ///
    /// # Errors
    /// As [`Pinned::new`].
    pub fn reserve(&mut self, n: usize) -> Result<(), CudaError> {
        if n > self.n {
            *self = Pinned::new(&self.device, n.next_power_of_two())?;
        }
        Ok(())
    }

    /// Its elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: allocated, initialised, and borrowed as this is.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.n) }
    }
}

/// Bytes that a [`Copier`] has on their way at once, twice.
const WINDOW: usize = 16 << 20;

/// Brings data to the device beside what the device's stream does: by a stream of its own, from two pieces of pinned memory that take turns,
/// so that one is filled while the other is copied.
pub struct Copier {
    stream: Arc<CudaStream>,
    windows: [(Pinned<u8>, Option<cudarc::driver::CudaEvent>); 2],
    turn: usize,
}

impl Copier {
    /// One with nothing on its way.
    ///
    /// # Errors
    /// Where the system has no pinned memory left.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let window = || Ok::<_, CudaError>((Pinned::new(device, WINDOW)?, None));
        Ok(Copier { stream: device.context.new_stream()?, windows: [window()?, window()?], turn: 0 })
    }

    /// Bytes it takes at once.
    pub fn window(&self) -> usize {
        WINDOW
    }

    /// Copies to `memory`, from `first` on, the `n` bytes that `fill` writes. They are there after [`Copier::wait`].
    ///
    /// # Errors
    /// Where the device fails.
    ///
    /// # Panics
    /// Beyond the end of `memory`, or for more than [`Copier::window`] bytes.
    pub fn copy(&mut self, memory: &mut Memory<u8>, first: usize, n: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), CudaError> {
        assert!(first + n <= memory.n, "{n} bytes at {first} of {}", memory.n);
        let (window, taken) = &mut self.windows[self.turn];
        if let Some(taken) = taken.take() {
            taken.synchronize()?;
        }
        let bytes = &mut window.as_mut_slice()[..n];
        fill(bytes);
        self.stream.context().bind_to_thread()?;
        // SAFETY: inside the allocation; the window is left alone until the event says that it was taken, or `drop` has waited.
        unsafe { result::memcpy_htod_async(memory.at + first as u64, bytes, self.stream.cu_stream()) }?;
        *taken = Some(self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?);
        self.turn = 1 - self.turn;
        Ok(())
    }

    /// Waits until all of it is there, for any stream.
    ///
    /// # Errors
    /// Where the device failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        Ok(self.stream.synchronize()?)
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // The windows go after this, and the copies read them.
        let _ = self.stream.synchronize();
    }
}

/// A stream that records what is asked of it. It does so no longer than this lives: whoever catches a panic goes on with the stream.
struct Capture<'s>(&'s Arc<CudaStream>);

impl Capture<'_> {
    fn end(self) -> Result<Option<cudarc::driver::CudaGraph>, CudaError> {
        let stream = self.0;
        std::mem::forget(self);
        Ok(stream.end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)?)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let _ = Capture(self.0).end();
    }
}

/// Recorded work.
pub struct Recording {
    /// None where nothing was asked. It goes before the code that it names.
    graph: Option<cudarc::driver::CudaGraph>,
    module: Arc<Module>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The graph goes next, wherever this is.
        let _ = self.module.context.bind_to_thread();
    }
}

// SAFETY: a graph's handles may be used from any thread that has the context bound, and launching binds it.
unsafe impl Send for Recording {}

impl Recording {
    /// Asks for all of it again, in the stream's order.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn launch(&self) -> Result<(), CudaError> {
        Ok(self.graph.as_ref().map_or(Ok(()), cudarc::driver::CudaGraph::launch)?)
    }
}

/// `n` elements on a device.
pub struct Memory<T> {
    device: Arc<Device>,
    at: sys::CUdeviceptr,
    n: usize,
    of: PhantomData<T>,
}

// SAFETY: an address on the device; whoever holds it may use it from any thread.
unsafe impl<T> Send for Memory<T> {}
// SAFETY: as above; writing takes `&mut`.
unsafe impl<T> Sync for Memory<T> {}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // Errors of the stream belong to who asked for what failed; nobody is left to be told of one here.
        let _ = self.device.context.bind_to_thread();
        let _ = self.device.stream.synchronize();
        // SAFETY: allocated by the device, freed once.
        let _ = unsafe { result::free_sync(self.at) };
    }
}

/// Some elements of a [`Memory`], borrowed.
#[derive(Clone, Copy)]
pub struct Part<'a, T> {
    at: u64,
    n: usize,
    of: PhantomData<&'a T>,
}

impl<T> Part<'_, T> {
    /// `n` elements of it from `first` on.
    ///
    /// # Panics
    /// Beyond its end.
    pub fn slice(&self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.n, "{n} elements at {first} of {}", self.n);
        Part { at: self.at + (first * size_of::<T>()) as u64, n, of: PhantomData }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Its address on the device.
    pub fn ptr(&self) -> u64 {
        self.at
    }
}

impl Memory<u8> {
    /// `n` elements of another type from `byte` on.
    ///
    /// # Panics
    /// Beyond its end, or where they would not be aligned.
    pub fn view<T: Pod>(&self, byte: usize, n: usize) -> Part<'_, T> {
        assert!(byte + n * size_of::<T>() <= self.n && byte.is_multiple_of(align_of::<T>()), "{n} elements at byte {byte} of {}", self.n);
        Part { at: self.at + byte as u64, n, of: PhantomData }
    }
}

impl<T: Pod> Memory<T> {
    /// `n` elements from `first` on.
    ///
    /// # Panics
    /// Beyond its end.
    pub fn part(&self, first: usize, n: usize) -> Part<'_, T> {
        assert!(first + n <= self.n, "{n} elements at {first} of {}", self.n);
        Part { at: self.at + (first * size_of::<T>()) as u64, n, of: PhantomData }
    }

    /// All of them.
    pub fn all(&self) -> Part<'_, T> {
        self.part(0, self.n)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Its address on the device, as kernels take it.
    pub fn ptr(&self) -> u64 {
        self.at
    }

    /// Writes `data` from element `first` on. The data may change once this returns.
    ///
    /// # Errors
    /// Where the device fails.
    ///
    /// # Panics
    /// Beyond its end.
    pub fn write(&mut self, first: usize, data: &[T]) -> Result<(), CudaError> {
        assert!(first + data.len() <= self.n, "{} elements at {first} of {}", data.len(), self.n);
        self.device.context.bind_to_thread()?;
        let at = self.at + (first * size_of::<T>()) as u64;
        let (bytes, device): (&[u8], _) = (bytemuck::cast_slice(data), &self.device);
        if bytes.is_empty() {
            return Ok(());
        }
        // A driver may stage what it copies before it returns. It need not, where the device reads the host's memory by itself.
        if bytes.len() > KEPT {
            // SAFETY: inside the allocation; the data is borrowed until it has been read.
            let asked = unsafe { result::memcpy_htod_async(at, bytes, device.stream.cu_stream()) };
            let read = device.wait();
            asked?;
            return read;
        }
        if device.sent().bytes + bytes.len() > KEPT {
            device.wait()?;
        }
        let kept: Box<[u8]> = bytes.into();
        // SAFETY: inside the allocation; what is copied is kept until the stream has been waited for.
        let asked = unsafe { result::memcpy_htod_async(at, &kept, device.stream.cu_stream()) };
        let mut sent = device.sent();
        sent.bytes += kept.len();
        sent.kept.push(kept);
        Ok(asked?)
    }

    /// Reads `data.len()` elements from `first` on, once all before is done.
    ///
    /// # Errors
    /// Where the device fails.
    ///
    /// # Panics
    /// Beyond its end.
    pub fn read(&self, first: usize, data: &mut [T]) -> Result<(), CudaError> {
        assert!(first + data.len() <= self.n, "{} elements at {first} of {}", data.len(), self.n);
        self.device.context.bind_to_thread()?;
        let at = self.at + (first * size_of::<T>()) as u64;
        if !data.is_empty() {
            // SAFETY: inside the allocation; the wait below outlives no borrow.
            unsafe { result::memcpy_dtoh_async(data, at, self.device.stream.cu_stream()) }?;
        }
        self.device.wait()
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn to_vec(&self) -> Result<Vec<T>, CudaError> {
        let mut data = vec![T::zeroed(); self.n];
        self.read(0, &mut data)?;
        Ok(data)
    }

    /// Copies `n` elements from one place to another.
    ///
    /// # Errors
    /// Where the device fails.
    ///
    /// # Panics
    /// Beyond its end, or where the places overlap.
    pub fn copy_within(&mut self, from: usize, to: usize, n: usize) -> Result<(), CudaError> {
        assert!(from.max(to) + n <= self.n && (from + n <= to || to + n <= from), "{n} elements from {from} to {to} of {}", self.n);
        self.device.context.bind_to_thread()?;
        let at = |i: usize| self.at + (i * size_of::<T>()) as u64;
        // SAFETY: both inside the allocation, and apart.
        Ok(unsafe { result::memcpy_dtod_async(at(to), at(from), n * size_of::<T>(), self.device.stream.cu_stream()) }?)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn fill(&mut self, byte: u8) -> Result<(), CudaError> {
        self.device.context.bind_to_thread()?;
        // SAFETY: inside the allocation.
        Ok(unsafe { result::memset_d8_async(self.at, byte, self.n * size_of::<T>(), self.device.stream.cu_stream()) }?)
    }

    /// Grows to at least `n` elements; what it held is lost.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn reserve(&mut self, n: usize) -> Result<(), CudaError> {
        if n > self.n {
            *self = self.device.clone().alloc(n.next_power_of_two())?;
        }
        Ok(())
    }
}
