//! The operations on a CUDA device: `kernels/*.cu` launched through the driver, which is found at run time or is not there.
//!
//! Nothing here needs CUDA to build. [`driver`] owns the device, its memory and its launches; [`attend`] is attention of decoded
//! positions over every kind of page, on the very bytes the host's backend reads; [`maps`] is what a profile makes of its latents there.
//! [`cublaslt`] is NVIDIA's library of products, for those that it computes faster.

pub mod attend;
pub mod cublaslt;
pub mod driver;
mod latents;
pub mod linear;
pub mod lora;
pub mod maps;
pub mod prefill;
pub mod rows;
pub mod sample;
pub mod seal;
pub mod trial;

pub use driver::{Copier, Device, Memory, Own, Part, Pinned, Recording};

/// Why the device cannot do what was asked. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("no NVIDIA driver is on this machine (libcuda.so.1 is not found): install one, or use --device cpu")]
    NoDriver,
    #[error("the NVIDIA driver finds no device: {0}")]
    NoDevice(String),
    #[error("there is no CUDA device {asked}: this machine has {count}, numbered from 0")]
    NoSuchDevice { asked: usize, count: usize },
    #[error("the NVIDIA driver speaks CUDA {}.{}, and CUDA 13.0 is the least (driver 580): update it, or use --device cpu", version / 1000, version % 1000 / 10)]
    OldDriver { version: i32 },
    #[error("{name} has compute capability {}.{}, and 8.0 is the least", capability.0, capability.1)]
    OldDevice { name: String, capability: (i32, i32) },
    #[error(
        "the device has no {bytes} bytes left, {free} of {total} are free: lower --kv-cache-memory-bytes, take a smaller model, or use --device cpu"
    )]
    NoMemory { bytes: usize, free: usize, total: usize },
    #[error("the driver does not take the kernels ({0}): update it, or use --device cpu")]
    Image(cudarc::driver::DriverError),
    #[error("kernel {kernel}: {source}")]
    Launch { kernel: &'static str, source: cudarc::driver::DriverError },
    #[error("cuBLASLt refused a product ({:?}); --device-kernels common serves without it", .0.0)]
    Library(#[from] cudarc::cublaslt::result::CublasError),
    #[error("the device failed: {0}")]
    Device(#[from] cudarc::driver::DriverError),
}

impl CudaError {
    /// Whether the device computes nothing more in this process: what it holds is undefined, and every call fails from now on.
    pub fn is_lost(&self) -> bool {
        use cudarc::driver::sys::CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY};
        match self {
            CudaError::Launch { source, .. } | CudaError::Device(source) => {
                // Those from 900 to 908 are of a recording, and end with it.
                !matches!(source.0, CUDA_ERROR_INVALID_VALUE | CUDA_ERROR_OUT_OF_MEMORY) && !(900..=908).contains(&(source.0 as u32))
            }
            _ => false,
        }
    }
}
