//! NVIDIA's library of products, where it is on the machine: found when it is asked for, as the driver is. Products of many rows may be given
//! to it, launch by launch, and are where it is faster (`trial`). Others, and all of a machine without it, are of this program's own kernels.
//!
//! It sums a row in one order, whatever the other rows: one algorithm stands for a product of so many outputs and inputs at any number of rows,
//! and none that splits the sum over blocks.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Attribute, cudaDataType};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::linear::{Job, Linears, MANY, Mode};

/// Bytes that its algorithms may use between their launches: what it recommends for Hopper, and more than others take.
pub const WORKSPACE: usize = 32 << 20;

/// What addresses and rows are multiples of, in bytes.
const ALIGNMENT: u32 = 16;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// What is asked of it.
const FUNCTIONS: [&str; 14] = [
    "cublasLtGetVersion",
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// A product as the library tells it from others, for any number of rows. Whether it is added to what is there makes none another: so its sums
/// are the same bits either way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Product {
    pub out: usize,
    pub inputs: usize,
    /// Outputs in f32, or in bf16.
    pub wide: bool,
    pub biased: bool,
}

/// The products of one launch.
pub type Launch = Vec<Product>;

/// Whether the library is at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its version, as `major * 10000 + minor * 100 + patch`.
    Version(usize),
    /// Under none of its names where the loader looks.
    Absent,
    /// It is there, and says no.
    Refused(String),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Found::Version(v) => write!(f, "cuBLASLt {}.{}.{}", v / 10_000, v / 100 % 100, v % 100),
            Found::Absent => write!(f, "no cuBLASLt (libcublasLt.so.13 or .12): products of many rows are by Strait's own kernels"),
            Found::Refused(why) => write!(f, "cuBLASLt does not start ({why}): products of many rows are by Strait's own kernels"),
        }
    }
}

/// A handle of the library, its workspace, and what was given to it.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    /// Of the device; of one stream's products, one after another.
    workspace: CUdeviceptr,
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    /// With the most rows each was looked for.
    algorithms: HashMap<Product, (cublasLtMatmulAlgo_t, usize)>,
    /// With the most rows it was asked about.
    launches: Vec<(Launch, usize)>,
}

// SAFETY: a handle may be used from any thread; one thread at a time launches, as the stream's order is of the caller's making.
unsafe impl Send for CublasLt {}
// SAFETY: as above; what was given is behind a lock.
unsafe impl Sync for CublasLt {}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made once, given back once; the device that holds this has bound its context and waited for its stream.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            let _ = cudarc::driver::result::free_sync(self.workspace);
        }
    }
}

impl CublasLt {
    /// Loads and starts the library, in the context that is bound; `Err` says why there is none.
    pub(super) fn open() -> Result<(Self, Found), Found> {
        // SAFETY: loading the library runs its own initialisers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(Found::Absent);
        }
        // SAFETY: as above.
        let library = unsafe { sys::culib() };
        // SAFETY: nothing is called.
        let has = |name: &str| unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok();
        if let Some(missing) = FUNCTIONS.into_iter().find(|name| !has(name)) {
            return Err(Found::Refused(format!("it has no {missing}")));
        }
        // SAFETY: it takes nothing.
        let version = unsafe { sys::cublasLtGetVersion() };
        // Before 12 versions had five digits.
        if version < 120_000 {
            return Err(Found::Refused(format!("its version is {version}, and 12.0 is the least")));
        }
        let handle = result::create_handle().map_err(|e| Found::Refused(format!("{:?}", e.0)))?;
        // SAFETY: the context is bound.
        let workspace = match unsafe { cudarc::driver::result::malloc_sync(WORKSPACE) } {
            Ok(at) => at,
            Err(e) => {
                // SAFETY: made above.
                let _ = unsafe { result::destroy_handle(handle) };
                return Err(Found::Refused(format!("no {WORKSPACE} bytes of the device for it: {e}")));
            }
        };
        Ok((CublasLt { handle, workspace, given: Mutex::default() }, Found::Version(version)))
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives launches of these products to it, of [`MANY`] rows up to `rows`. Whether it has an algorithm for each.
    pub(super) fn give(&self, launch: &[Product], rows: usize) -> bool {
        self.take_back(launch);
        let mut given = self.given();
        for product in launch {
            // What was tried is what is used: the library may give another one when it is asked again. For other rows it is.
            if given.algorithms.get(product).is_some_and(|(_, most)| *most == rows) {
                continue;
            }
            let Some(algorithm) = self.algorithm(product, rows) else { return false };
            given.algorithms.insert(*product, (algorithm, rows));
        }
        given.launches.push((launch.to_vec(), rows));
        true
    }

    /// Takes launches of these products from it.
    pub(super) fn take_back(&self, launch: &[Product]) {
        self.given().launches.retain(|(of, _)| of != launch);
    }

    /// Whether such a launch was given to it.
    pub(super) fn has(&self, linears: &Linears<'_>) -> bool {
        let products = || linears.jobs.iter().map(|job| product(linears, job));
        self.given().launches.iter().any(|(of, most)| linears.rows <= *most && of.iter().copied().map(Some).eq(products()))
    }

    /// An algorithm for so many rows that does for fewer as well, and sums each row in one piece.
    fn algorithm(&self, of: &Product, rows: usize) -> Option<cublasLtMatmulAlgo_t> {
        // A bias lies somewhere: the library looks at how it is aligned, and takes it for no better than that.
        let layout = |rows: usize| Layout::new(of, rows, of.out, of.inputs, self.workspace + u64::from(ALIGNMENT));
        let found = layout(rows).and_then(|layout| layout.preferred(self.handle)).ok()?;
        (MANY..=rows).all(|rows| layout(rows).is_ok_and(|layout| layout.check(self.handle, &found))).then_some(found)
    }

    /// Asks the stream for products that [were given](CublasLt::has) to it; its context is bound.
    pub(super) fn launch(&self, stream: CUstream, linears: &Linears<'_>) -> Result<(), CublasError> {
        for job in linears.jobs {
            let of = product(linears, job).expect("launches that it has");
            let (algorithm, _) = self.given().algorithms[&of];
            let layout = Layout::new(&of, linears.rows, job.ldy, linears.ldx, job.bias[0])?;
            let (alpha, beta) = (1.0f32, if job.mode == Mode::Add { 1.0f32 } else { 0.0 });
            // SAFETY: shapes as they were said; the caller's memory; the workspace is of this stream alone.
            unsafe {
                result::matmul(
                    self.handle,
                    layout.product,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    job.w[0] as *const _,
                    layout.w,
                    linears.x as *const _,
                    layout.x,
                    job.y as *const _,
                    layout.y,
                    job.y as *mut _,
                    layout.y,
                    &raw const algorithm,
                    self.workspace as *mut _,
                    WORKSPACE,
                    stream.cast(),
                )
            }?;
        }
        Ok(())
    }
}

/// What a job of a launch is to the library, if anything: a bias and what is there would be added in another order than own kernels add them.
fn product(linears: &Linears<'_>, job: &Job) -> Option<Product> {
    let (out, inputs, biased) = (job.out, linears.inputs, job.bias[0] != 0);
    match job.mode {
        Mode::Gated => None,
        Mode::Add if biased => None,
        mode => Some(Product { out, inputs, wide: mode != Mode::Bf16, biased }),
    }
}

/// A product as the library wants it described. It counts columns first, so rows of weights and of inputs are columns to it: the result's
/// columns are rows, of `out` outputs.
struct Layout {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once, given back once; null where it was not made, which is left alone.
        unsafe {
            if !self.product.is_null() {
                let _ = result::destroy_matmul_desc(self.product);
            }
            for layout in [self.w, self.x, self.y].into_iter().filter(|l| !l.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Layout {
    fn new(of: &Product, rows: usize, ldy: usize, ldx: usize, bias: u64) -> Result<Self, CublasError> {
        let y = match (of.wide, of.biased) {
            (true, _) => cudaDataType::CUDA_R_32F,
            (false, false) => cudaDataType::CUDA_R_16BF,
            // A bias of f32 does not go with it.
            (false, true) => return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        };
        let mut layout = Layout {
            product: result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F)?,
            w: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            y: std::ptr::null_mut(),
        };
        layout.w = result::create_matrix_layout(cudaDataType::CUDA_R_16BF, of.inputs as u64, of.out as u64, of.inputs as i64)?;
        layout.x = result::create_matrix_layout(cudaDataType::CUDA_R_16BF, of.inputs as u64, rows as u64, ldx as i64)?;
        layout.y = result::create_matrix_layout(y, of.out as u64, rows as u64, ldy as i64)?;
        layout.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if of.biased {
            layout.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            layout.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        Ok(layout)
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> Result<(), CublasError> {
        // SAFETY: the library reads as many bytes as the value has, and keeps them.
        unsafe { result::set_matmul_desc_attribute(self.product, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
    }

    /// What the library takes for the fastest algorithm.
    fn preferred(&self, handle: sys::cublasLtHandle_t) -> Result<cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
        /// Given back when it is left.
        struct Preference(sys::cublasLtMatmulPreference_t);
        impl Drop for Preference {
            fn drop(&mut self) {
                // SAFETY: made once, given back once.
                let _ = unsafe { result::destroy_matmul_pref(self.0) };
            }
        }
        let preference = Preference(result::create_matmul_pref()?);
        let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        // SAFETY: the library reads as many bytes as are said, and keeps them; all descriptions live on.
        unsafe {
            let (workspace, alignment) = (WORKSPACE as u64, ALIGNMENT);
            let wish = |wish, value, bytes| result::set_matmul_pref_attribute(preference.0, wish, value, bytes);
            wish(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
            wish(Wish::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reductions).cast(), 4)?;
            for aligned in [
                Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                wish(aligned, (&raw const alignment).cast(), 4)?;
            }
            Ok(result::get_matmul_algo_heuristic(handle, self.product, self.w, self.x, self.y, self.y, preference.0)?.algo)
        }
    }

    /// Whether an algorithm does for it, with the workspace there is.
    fn check(&self, handle: sys::cublasLtHandle_t, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let mut of = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: valid descriptions, and a place for the answer, of which zeros are one.
        let of = unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(handle, self.product, self.w, self.x, self.y, self.y, algorithm, of.as_mut_ptr());
            status.result().map(|()| of.assume_init())
        };
        of.is_ok_and(|of| of.state.result().is_ok() && of.workspaceSize <= WORKSPACE)
    }
}
