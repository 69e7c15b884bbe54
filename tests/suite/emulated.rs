//! A driver whose device is this CPU (`kernels/emulation`): the dynamic loader gives a library that is there already to who asks for
//! its name.

use std::process::Command;
use std::sync::OnceLock;

/// The driver, once it is loaded, and as much of cuBLASLt as is asked for.
pub(crate) static EMULATED: OnceLock<libloading::Library> = OnceLock::new();
pub(crate) static CUBLASLT: OnceLock<libloading::Library> = OnceLock::new();

/// Compiles the emulated driver and library, once for each state of their sources, and loads them, before anything asks for either.
///
/// # Errors
/// Where there is no C++ compiler, or it fails.
pub(crate) fn load() -> Result<(), String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut hash = blake3::Hasher::new();
    for dir in [root.clone(), root.join("emulation")] {
        let mut files: Vec<_> =
            std::fs::read_dir(dir).map_err(|e| e.to_string())?.map(|f| f.unwrap().path()).filter(|p| p.is_file()).collect();
        files.sort();
        for file in files.iter().filter(|f| f.extension().is_some_and(|e| ["cu", "cuh", "h", "cpp"].contains(&e.to_str().unwrap()))) {
            hash.update(&std::fs::read(file).map_err(|e| e.to_string())?);
        }
    }
    let state = &hash.finalize().to_hex()[..16];
    for (soname, source, loaded) in [("libcuda.so", "driver", &EMULATED), ("libcublasLt.so", "cublaslt", &CUBLASLT)] {
        let library = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated-{source}-{state}.so"));
        if !library.exists() {
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
            let part = library.with_extension(format!("{}.part", std::process::id()));
            let out = Command::new(&compiler)
                .args(["-O2", "-std=c++17", "-shared", "-fPIC", "-march=native", &format!("-Wl,-soname,{soname}"), "-o"])
                .arg(&part)
                .arg(root.join("emulation").join(source).with_extension("cpp"))
                .output()
                .map_err(|e| format!("{compiler} does not run: {e}; the kernels' tests need a C++17 compiler (Debian: apt install g++)"))?;
            if !out.status.success() {
                return Err(format!("{compiler} fails:\n{}", String::from_utf8_lossy(&out.stderr)));
            }
            std::fs::rename(part, &library).map_err(|e| e.to_string())?;
        }
        // SAFETY: our own library; it runs nothing when it is loaded but the constructors of its tables.
        loaded.set(unsafe { libloading::Library::new(library) }.map_err(|e| e.to_string())?).map_err(|_| "loaded twice".to_owned())?;
    }
    Ok(())
}
