//! Files that are replaced whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Puts what `fill` writes at `path`, or leaves everything as it was.
///
/// The bytes go to a new file in the same folder, reach the disk, and only then take the name.
pub fn replace_file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut draft = Draft::beside(path)?;
    fill(&mut draft)?;
    draft.place()
}

/// A new file that will take the name of another in its folder; it is removed unless it does.
#[derive(Debug)]
pub struct Draft {
    file: BufWriter<File>,
    grows_at: PathBuf,
    path: PathBuf,
    placed: bool,
}

impl Draft {
    /// For `path`, under a name that nobody else has.
    ///
    /// Only a regular file is replaced: the name of a device, `/dev/null` say, belongs to all that use it.
    ///
    /// # Errors
    /// Where `path` names something else, or its folder cannot be written.
    pub fn beside(path: &Path) -> io::Result<Draft> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let name = replaceable(path)?;
        loop {
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{serial}.tmp", std::process::id()));
            let grows_at = folder_of(path).join(hidden);
            match File::options().write(true).create_new(true).open(&grows_at) {
                Ok(file) => return Ok(Draft::of(file, grows_at, path)),
                // A file of a dead process that had our id: the next serial is another name.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            }
        }
    }

    /// For `path`, at [`part`] of it, over whatever a kill left there: for who keeps everybody else out of the folder.
    ///
    /// # Errors
    /// As [`Draft::beside`].
    pub fn alone(path: &Path) -> io::Result<Draft> {
        replaceable(path)?;
        let grows_at = part(path);
        Ok(Draft::of(File::create(&grows_at)?, grows_at, path))
    }

    fn of(file: File, grows_at: PathBuf, path: &Path) -> Draft {
        Draft { file: BufWriter::with_capacity(1 << 18, file), grows_at, path: path.to_owned(), placed: false }
    }

    /// Takes the bytes to the disk, and then the name.
    ///
    /// # Errors
    /// Where that fails; what stood there before stands unchanged then.
    pub fn place(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        std::fs::rename(&self.grows_at, &self.path)?;
        self.placed = true;
        // Takes the name to the disk as well. Where a file system cannot, a power cut may bring the old file back, whole:
        // no failure of this write.
        let _ = File::open(folder_of(&self.path)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.placed {
            let _ = std::fs::remove_file(&self.grows_at); // the failure that led here is the one to report
        }
    }
}

/// Where the one draft of `path` grows that is made by [`Draft::alone`].
pub fn part(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

/// The name of a file that may be replaced.
fn replaceable(path: &Path) -> io::Result<&std::ffi::OsStr> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
    let name = path.file_name().ok_or_else(|| invalid("the path names no file"))?;
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => Err(invalid("not a regular file")),
        _ => Ok(name),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
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

    #[test]
    fn a_draft_made_alone_takes_the_place_of_what_a_kill_left_and_goes_when_it_fails() {
        let folder = std::env::temp_dir().join(format!("strait-draft-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a");
        std::fs::write(part(&path), "longer than what comes now").unwrap();
        let mut draft = Draft::alone(&path).unwrap();
        draft.write_all(b"whole").unwrap();
        assert!(!path.exists());
        draft.place().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        // As where the disk is full: what was written gives its room back.
        let mut draft = Draft::alone(&path).unwrap();
        draft.write_all(&[7; 3 << 20]).unwrap();
        drop(draft);
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        assert_eq!(Draft::alone(&folder).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
