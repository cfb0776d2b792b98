//! The memory of the process: free memory goes back to the system, and what each thread holds is counted, so that decoding can
//! be ended before it takes more than it may. Programs make [`Counting`] their allocator; without that, nothing is counted
//! and nothing ended.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread took and did not give back; below 0 where it gave back what others took.
    static HELD: Cell<i64> = const { Cell::new(0) };
}

/// Bytes that this thread has taken since it began, less those that it has given back. Only differences mean something.
pub fn held() -> i64 {
    HELD.with(Cell::get)
}

fn count(bytes: i64) {
    // At a thread's end there is nothing to count with any more.
    let _ = HELD.try_with(|held| held.set(held.get().wrapping_add(bytes)));
}

/// Bytes from which on the system's allocator takes a buffer from the kernel, and gives it back when it is freed; and free bytes
/// at a heap's end from which on it gives those back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: i32 = 4 << 20;

/// Has free memory go back to the system. By itself, glibc keeps up to 64 MiB for each of the heaps that threads take turns
/// with, once it has seen large pictures; a server that loads its models anew has many such threads over time. To be called
/// before there are threads.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: mallopt takes two numbers, and there is no other thread yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}

/// Keeps free memory for this process, for work that takes the same large buffers again and again: glibc would give them back to
/// the kernel, which then clears them page by page, a fifth of the time of a step of training. To be called before there are
/// threads that allocate.
pub fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: mallopt takes two numbers.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// The system's allocator, counted by thread.
pub struct Counting;

// SAFETY: every call goes to the system's allocator as it came, and its answer is given back as it is. Counting neither
// allocates nor panics: the counter is a constant until it is first used, and has nothing to drop.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's own promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's own promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's own promises.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's own promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}
