//! Files that are replaced whole or not at all.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Puts what `fill` writes at `path`, or leaves everything as it was.
///
/// The bytes go to a new file in the same folder, reach the disk, and only then take the name.
pub(super) fn replace_file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let (file, mut unfinished) = beside(path)?;
    let mut w = io::BufWriter::with_capacity(1 << 20, file);
    fill(&mut w)?;
    let file = w.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&unfinished.path, path)?;
    unfinished.placed = true;
    // Takes the name to the disk as well. Where a file system cannot, a power cut may bring the old file back, whole:
    // no failure of this write.
    let _ = std::fs::File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// A file that is removed unless it has taken its place.
pub(super) struct Unfinished {
    path: PathBuf,
    placed: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.placed {
            let _ = std::fs::remove_file(&self.path); // the failure that led here is the one to report
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file in the folder of `path`, to take its name.
///
/// Only a regular file is replaced: the name of a device, `/dev/null` say, belongs to all that use it.
pub(super) fn beside(path: &Path) -> io::Result<(std::fs::File, Unfinished)> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
    let name = path.file_name().ok_or_else(|| invalid("the path names no file"))?;
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(invalid("not a regular file"));
    }
    loop {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{serial}.tmp", std::process::id()));
        let path = folder_of(path).join(hidden);
        match std::fs::OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, Unfinished { path, placed: false })),
            // A file of a dead process that had our id: the next serial is another name.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = std::env::temp_dir().join(format!("strait-replace-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a.safetensors");
        replace_file(&path, |w| w.write_all(b"old")).unwrap();
        let full = replace_file(&path, |w| {
            w.write_all(&[7; 3 << 20])?; // beyond the buffer, so bytes are in the new file already
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        replace_file(&path, |w| w.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        // A folder stands where the file should go, before the write or since it began: the rename fails, and cleans up.
        let occupied = folder.join("folder");
        let occupy = || std::fs::create_dir(&occupied).and_then(|()| std::fs::write(occupied.join("x"), b"x"));
        assert!(replace_file(&occupied, |w| w.write_all(b"new").and_then(|()| occupy())).is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2);
        let began = replace_file(&occupied, |_| panic!("nothing is asked for that has no place"));
        assert_eq!(began.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
