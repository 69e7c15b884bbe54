//! What the reader of a sealed page sees of latents: the one place where training meets the quantiser.
//!
//! Both functions replace latents by the numbers their codes stand for, through the very codec that serves (`quant`), in the groups
//! of a sealed page (`kv::layout`). Latents of sinks are never read, take no part in scales, and stay as they are. With 16 bits
//! nothing changes: f16 rounds by 2^-11, nothing beside what a rank drops.

use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{Cskv, VALUE_GROUP};
use crate::quant::{dequantise, quantise_group};

/// Key latents `[n][rank]`, the first at `position`: per channel over pages, which begin at multiples of [`PAGE_TOKENS`].
///
/// A last page that is not full shares its scales over what there is of it; serving would not have sealed it yet.
pub fn keys(latents: &mut [f32], rank: usize, position: usize, cskv: &Cskv) {
    if cskv.bits == 16 {
        return;
    }
    let (page, end) = (PAGE_TOKENS as usize, position + latents.len() / rank);
    let mut channel = Vec::with_capacity(page);
    let mut codes = vec![0; page];
    let mut from = position.max(cskv.sinks as usize);
    while from < end {
        let to = ((from / page + 1) * page).min(end);
        let rows = &mut latents[(from - position) * rank..(to - position) * rank];
        for r in 0..rank {
            channel.clear();
            channel.extend(rows.iter().skip(r).step_by(rank));
            let codes = &mut codes[..to - from];
            let scale = quantise_group(&channel, cskv.bits, codes);
            dequantise(codes, scale, &mut channel);
            rows.iter_mut().skip(r).step_by(rank).zip(&channel).for_each(|(x, &y)| *x = y);
        }
        from = to;
    }
}

/// Value latents `[n][rank]`, the first at `position`: per token in groups of [`VALUE_GROUP`] channels.
pub fn values(latents: &mut [f32], rank: usize, position: usize, cskv: &Cskv) {
    if cskv.bits == 16 {
        return;
    }
    let mut codes = [0; VALUE_GROUP];
    for token in latents.chunks_exact_mut(rank).skip((cskv.sinks as usize).saturating_sub(position)) {
        for group in token.chunks_mut(VALUE_GROUP) {
            let codes = &mut codes[..group.len()];
            let scale = quantise_group(group, cskv.bits, codes);
            dequantise(codes, scale, group);
        }
    }
}
