//! The same sums with AVX2, two rows and two samples at a time.
//!
//! A weight has up to 23 bits, more than the 16 that the processor multiplies in pairs: it is taken as 2¹¹ × its high part
//! + its low part. The sum of both is the weight's product exactly, whatever the order, since nothing is rounded on the way.

use std::arch::x86_64::{
    __m256i, _mm_set_epi64x, _mm256_add_epi32, _mm256_castsi128_si256, _mm256_extract_epi32, _mm256_inserti128_si256,
    _mm256_madd_epi16, _mm256_packs_epi32, _mm256_packus_epi16, _mm256_set1_epi32, _mm256_setr_epi8,
    _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_srai_epi32,
};
use std::ops::Range;

use image::RgbImage;

use super::{HALF, PRECISION_BITS, Taps, vertical};

/// Bits of a weight's low part.
const LOW_BITS: i32 = 11;
/// Samples that are read at once: 12 bytes of 16.
const BLOCK: usize = 4;
/// Bytes that are read at once.
const READ: usize = 16;

#[target_feature(enable = "avx2")]
pub(super) fn resize(picture: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    vertical(&horizontal(picture, columns, rows.span()), rows, columns.len())
}

/// For each output sample, its first input byte and, for each [`BLOCK`] of its samples, the high and low parts of two
/// weights, then of two more.
struct Blocks {
    starts: Vec<usize>,
    weights: Vec<[i32; 4]>,
    each: usize,
}

impl Blocks {
    fn new(taps: &Taps) -> Self {
        let each = taps.longest.div_ceil(BLOCK).max(1);
        let mut weights = vec![[0; 4]; each * taps.len()];
        for ((_, from), to) in taps.iter().zip(weights.chunks_exact_mut(each)) {
            for (at, weight) in from.iter().enumerate() {
                // A negative weight's high part is negative, too; of both, 16 bits.
                let (high, low) = ((weight >> LOW_BITS) & 0xFFFF, weight & ((1 << LOW_BITS) - 1));
                let (pair, half) = (at % BLOCK / 2, at % 2);
                to[at / BLOCK][2 * pair] |= high << (16 * half);
                to[at / BLOCK][2 * pair + 1] |= low << (16 * half);
            }
        }
        Self { starts: taps.samples.iter().map(|samples| 3 * samples.start).collect(), weights, each }
    }

    /// Bytes that one output sample's blocks read.
    fn reach(&self) -> usize {
        3 * BLOCK * (self.each - 1) + READ
    }
}

#[target_feature(enable = "avx2")]
fn horizontal(picture: &RgbImage, columns: &Taps, rows: Range<usize>) -> Vec<u8> {
    // Of 16 bytes, samples 0 and 1 (then 2 and 3) as pairs of 16 bits: R R, G G, B B, and nothing.
    const N: i8 = -1;
    let pair = _mm256_setr_epi8(
        0, N, 3, N, 1, N, 4, N, 2, N, 5, N, N, N, N, N, 0, N, 3, N, 1, N, 4, N, 2, N, 5, N, N, N, N, N,
    );
    let next_pair = _mm256_setr_epi8(
        6, N, 9, N, 7, N, 10, N, 8, N, 11, N, N, N, N, N, 6, N, 9, N, 7, N, 10, N, 8, N, 11, N, N, N, N, N,
    );
    let blocks = Blocks::new(columns);
    let (source_stride, stride) = (picture.width() as usize * 3, columns.len() * 3);
    let mut out = vec![0; rows.len() * stride];
    // Two rows, with the bytes behind them that their last blocks read, and what becomes of them, a byte longer because
    // pixels are written as four bytes.
    let mut upper = vec![0; source_stride + blocks.reach()];
    let mut lower = upper.clone();
    let mut upper_out = vec![0; stride + 1];
    let mut lower_out = upper_out.clone();
    for (at, lines) in rows.clone().step_by(2).zip(out.chunks_mut(2 * stride)) {
        // An odd last row goes with itself.
        for (row, copy) in [(at, &mut upper), ((at + 1).min(rows.end - 1), &mut lower)] {
            copy[..source_stride].copy_from_slice(&picture.as_raw()[row * source_stride..][..source_stride]);
        }
        for (column, (&start, weights)) in
            blocks.starts.iter().zip(blocks.weights.chunks_exact(blocks.each)).enumerate()
        {
            let (upper, lower) = (&upper[start..][..blocks.reach()], &lower[start..][..blocks.reach()]);
            let mut high = _mm256_setzero_si256();
            let mut low = _mm256_set1_epi32(HALF);
            for (block, &[high_0, low_0, high_1, low_1]) in weights.iter().enumerate() {
                let at = 3 * BLOCK * block;
                let (Some(upper), Some(lower)) = (upper[at..].first_chunk(), lower[at..].first_chunk()) else { break };
                let samples = both(upper, lower);
                let first = _mm256_shuffle_epi8(samples, pair);
                let second = _mm256_shuffle_epi8(samples, next_pair);
                high = add_products(add_products(high, first, high_0), second, high_1);
                low = add_products(add_products(low, first, low_0), second, low_1);
            }
            let sums = _mm256_add_epi32(_mm256_slli_epi32::<LOW_BITS>(high), low);
            let values = _mm256_srai_epi32::<{ PRECISION_BITS as i32 }>(sums);
            // Clamped to 0 … 255 on the way to bytes.
            let words = _mm256_packs_epi32(values, values);
            let bytes = _mm256_packus_epi16(words, words);
            upper_out[3 * column..][..4].copy_from_slice(&_mm256_extract_epi32::<0>(bytes).to_le_bytes());
            lower_out[3 * column..][..4].copy_from_slice(&_mm256_extract_epi32::<4>(bytes).to_le_bytes());
        }
        for (line, done) in lines.chunks_exact_mut(stride).zip([&upper_out, &lower_out]) {
            line.copy_from_slice(&done[..stride]);
        }
    }
    out
}

/// 16 bytes of each of two rows.
#[target_feature(enable = "avx2")]
fn both(upper: &[u8; READ], lower: &[u8; READ]) -> __m256i {
    let half = |bytes: &[u8; READ]| {
        let bytes = u128::from_le_bytes(*bytes);
        _mm_set_epi64x((bytes >> 64) as i64, bytes as i64)
    };
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(half(upper)), half(lower))
}

/// `sums` and the products of each pair of `samples` with the pair `weights`.
#[target_feature(enable = "avx2")]
fn add_products(sums: __m256i, samples: __m256i, weights: i32) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(samples, _mm256_set1_epi32(weights)))
}
