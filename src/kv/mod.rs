//! The memory of the cache: one arena of bytes from which pages of every profile are cut.
//! Who owns which page is decided in `pages`; what lies where in a page, in `layout`.

use bytemuck::Pod;

use crate::ids::PageAddr;

pub mod layout;

/// A fixed range of zeroed memory, committed by the operating system as it is first touched.
pub struct Arena {
    map: memmap2::MmapMut,
}

impl Arena {
    /// Reserves `bytes`, rounded up to whole address units.
    ///
    /// # Errors
    /// When the operating system refuses the reservation.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let bytes = bytes.next_multiple_of(PageAddr::UNIT).max(PageAddr::UNIT);
        let bytes = usize::try_from(bytes).map_err(std::io::Error::other)?;
        let map = memmap2::MmapMut::map_anon(bytes)?;
        // Attention jumps from page to page: with large ones of the system's, few jumps leave what its translations remember. Where
        // there are none, all is as right, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Arena { map })
    }

    /// Bytes reserved.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether nothing is reserved; never, as an arena has at least one unit.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// `n` elements at `offset` bytes into the page.
    ///
    /// # Panics
    /// Outside the arena, or where `offset` is not a multiple of the element's alignment.
    pub fn slice<T: Pod>(&self, page: PageAddr, offset: usize, n: usize) -> &[T] {
        let start = page.byte() as usize + offset;
        bytemuck::cast_slice(&self.map[start..start + n * size_of::<T>()])
    }

    /// As [`Arena::slice`], to write.
    pub fn slice_mut<T: Pod>(&mut self, page: PageAddr, offset: usize, n: usize) -> &mut [T] {
        let start = page.byte() as usize + offset;
        bytemuck::cast_slice_mut(&mut self.map[start..start + n * size_of::<T>()])
    }

    /// Copies `n` bytes between two places of the arena, which must not overlap.
    pub fn copy(&mut self, from: (PageAddr, usize), to: (PageAddr, usize), n: usize) {
        let (from, to) = (from.0.byte() as usize + from.1, to.0.byte() as usize + to.1);
        assert!(from + n <= to || to + n <= from, "pages overlap");
        self.map.copy_within(from..from + n, to);
    }
}
