//! What a reader of sealed pages sees of latents: the quantisers of `quant` over pages and tokens, without a page's words.

use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{Quantiser, VALUE_GROUP, Width};
use crate::quant::{dequantise, levels, quantise_group, quantise_normal, to_f16};

const P: usize = PAGE_TOKENS as usize;

/// How latents are quantised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Coding {
    pub width: Width,
    pub quantiser: Quantiser,
    /// Of the Hadamard quantiser: blocks with a scale of their own.
    pub blocks: usize,
}

/// Replaces key latents `[n][rank]` of consecutive positions, the first of which stands at `position`. Those of the first `sinks`
/// positions stay as they are, and take no part in scales.
pub fn keys(latents: &mut [f32], coding: Coding, position: usize, sinks: usize) {
    let Coding { width: Width { rank, bits }, quantiser, .. } = coding;
    if rank == 0 {
        return;
    }
    let skip = sinks.saturating_sub(position).min(latents.len() / rank);
    let (position, latents) = (position + skip, &mut latents[skip * rank..]);
    if bits == 16 || quantiser == Quantiser::Hadamard {
        return per_token(latents, coding);
    }
    let first = (P - position % P).min(latents.len() / rank);
    let (head, rest) = latents.split_at_mut(first * rank);
    let (mut column, mut codes) = ([0.0; P], [0; P]);
    for page in std::iter::once(head).chain(rest.chunks_mut(P * rank)) {
        let n = page.len() / rank;
        for r in 0..rank {
            (0..n).for_each(|p| column[p] = page[p * rank + r]);
            let scale = quantise_group(&column[..n], bits, &mut codes[..n]);
            dequantise(&codes[..n], scale, &mut column[..n]);
            (0..n).for_each(|p| page[p * rank + r] = column[p]);
        }
    }
}

/// Replaces value latents `[n][rank]`.
pub fn values(latents: &mut [f32], coding: Coding) {
    let Coding { width: Width { rank, bits }, quantiser, .. } = coding;
    if rank == 0 {
        return;
    }
    if bits == 16 || quantiser == Quantiser::Hadamard {
        return per_token(latents, coding);
    }
    let mut codes = [0; VALUE_GROUP];
    for group in latents.chunks_exact_mut(rank).flat_map(|row| row.chunks_mut(VALUE_GROUP)) {
        let codes = &mut codes[..group.len()];
        let scale = quantise_group(group, bits, codes);
        dequantise(codes, scale, group);
    }
}

fn per_token(latents: &mut [f32], Coding { width: Width { rank, bits }, blocks, .. }: Coding) {
    if bits == 16 {
        latents.iter_mut().for_each(|x| *x = to_f16(*x).to_f32());
        return;
    }
    let (levels, unit) = levels(bits);
    let mut codes = vec![0; rank / blocks];
    for block in latents.chunks_exact_mut(rank / blocks) {
        let by = quantise_normal(block, bits, &mut codes).to_f32() / unit;
        block.iter_mut().zip(&codes).for_each(|(x, &code)| *x = f32::from(levels[code as usize]) * by);
    }
}
