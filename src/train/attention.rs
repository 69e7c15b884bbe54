//! Attention as a compressed sequence sees it, and its gradient: for some queries of a text, exact keys and values in the window and
//! at the sinks, approximate ones between.
//!
//! Cost on `q` queries, `n` tokens, `h` query heads of `d`: two matrix products of `q h n d` multiply-adds forward, three back, and
//! `q h` rows of `n` exponentials; memory two matrices `[h][q][n]`.

use candle_core::{Device, Result, Tensor};

use crate::ops::Heads;

/// What is exact, for one stretch of text. Rows are tokens.
#[derive(Clone, Copy)]
pub(super) struct Exact<'a> {
    pub(super) heads: Heads,
    /// After rope: `[n][kv_heads][head_dim]`.
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    /// After rope: `[n][heads][head_dim]`.
    pub(super) queries: &'a [f32],
    /// First tokens that stay exact.
    pub(super) sinks: usize,
    /// A query's last tokens that stay exact, itself among them.
    pub(super) window: usize,
}

impl Exact<'_> {
    /// Tokens that the query of row `i` sees through the map: from the sinks to the window.
    pub(super) fn compressed(&self, i: usize) -> std::ops::Range<usize> {
        self.sinks..(i + 1).saturating_sub(self.window).max(self.sinks)
    }
}

/// A forward pass, with what its gradient takes.
pub(super) struct Attended<'a> {
    exact: Exact<'a>,
    rows: &'a [usize],
    /// `[kv_heads][queries of a KV head][head_dim]`; queries of a KV head: its query heads, each over `rows`.
    queries: Tensor,
    /// `[kv_heads][n][head_dim]`.
    values: Tensor,
    /// `[kv_heads][queries of a KV head][n]`: probabilities of compressed tokens; zero elsewhere.
    compressed: Vec<f32>,
    /// Per row of `compressed`: probabilities of the exact tokens, in order.
    near: Vec<Vec<f32>>,
    /// `[rows][heads][head_dim]`.
    pub(super) output: Vec<f32>,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums, so that it becomes vector code.
    let mut sums = [0.0f32; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (x, y))| *s += x * y);
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// `x: [n][kv_heads * d]` as `[kv_heads][n][d]`.
fn by_head(x: &Tensor, kv_heads: usize) -> Result<Tensor> {
    let n = x.dim(0)?;
    x.reshape((n, kv_heads, ()))?.transpose(0, 1)?.contiguous()
}

impl<'a> Attended<'a> {
    /// Attention of the queries at `rows` over keys (after rope) and values `[n][kv_channels]` where [`Exact::compressed`] says so.
    pub(super) fn new(exact: Exact<'a>, rows: &'a [usize], keys: &Tensor, values: &Tensor) -> Result<Self> {
        let Heads { heads, kv_heads, head_dim: d, scale } = exact.heads;
        let (share, n) = (heads / kv_heads, keys.dim(0)?);
        let of_head = share * rows.len();
        let picked: Vec<f32> =
            (0..heads).flat_map(|h| rows.iter().flat_map(move |&i| &exact.queries[(i * heads + h) * d..][..d])).copied().collect();
        let queries = Tensor::from_vec(picked, (kv_heads, of_head, d), &Device::Cpu)?;
        let values = by_head(values, kv_heads)?;
        let mut compressed = queries.matmul(&by_head(keys, kv_heads)?.transpose(1, 2)?)?.flatten_all()?.to_vec1::<f32>()?;
        let mut near = Vec::with_capacity(heads * rows.len());
        for (at, scores) in compressed.chunks_exact_mut(n).enumerate() {
            let (head, i) = (at / rows.len(), rows[at % rows.len()]);
            let query = &exact.queries[(i * heads + head) * d..][..d];
            let far = exact.compressed(i);
            let key = |j: usize| &exact.keys[(j * kv_heads + head / share) * d..][..d];
            let mut p: Vec<f32> = tokens(&far, i).map(|j| dot(query, key(j)) * scale).collect();
            scores[..far.start].fill(0.0);
            scores[far.end..].fill(0.0);
            let far = &mut scores[far];
            far.iter_mut().for_each(|x| *x *= scale);
            let max = p.iter().chain(far.iter()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let mut sum = 0.0f64;
            for x in p.iter_mut().chain(far.iter_mut()) {
                *x = (*x - max).exp();
                sum += f64::from(*x);
            }
            let norm = (1.0 / sum) as f32;
            p.iter_mut().chain(far.iter_mut()).for_each(|x| *x *= norm);
            near.push(p);
        }
        let p = Tensor::from_slice(&compressed, (kv_heads, of_head, n), &Device::Cpu)?;
        let far = p.matmul(&values)?.flatten_all()?.to_vec1::<f32>()?;
        let mut output = vec![0.0; rows.len() * heads * d];
        for (at, (far, p)) in far.chunks_exact(d).zip(&near).enumerate() {
            let (head, row) = (at / rows.len(), at % rows.len());
            let out = &mut output[(row * heads + head) * d..][..d];
            out.copy_from_slice(far);
            let i = rows[row];
            for (j, &p) in tokens(&exact.compressed(i), i).zip(p) {
                let value = &exact.values[(j * kv_heads + head / share) * d..][..d];
                out.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
            }
        }
        Ok(Attended { exact, rows, queries, values, compressed, near, output })
    }

    /// Gradients of compressed keys and values, `[n][kv_channels]` each, from that of the output, `[rows][heads][head_dim]`.
    pub(super) fn gradients(self, output: &[f32]) -> Result<[Tensor; 2]> {
        let Heads { heads, kv_heads, head_dim: d, scale } = self.exact.heads;
        let (share, n, of_head) = (heads / kv_heads, self.values.dim(1)?, self.queries.dim(1)?);
        let (rows, exact) = (self.rows, self.exact);
        let by_query: Vec<f32> =
            (0..heads).flat_map(|h| (0..rows.len()).flat_map(move |row| &output[(row * heads + h) * d..][..d])).copied().collect();
        let of_output = Tensor::from_slice(&by_query, (kv_heads, of_head, d), &Device::Cpu)?;
        let mut of_scores = of_output.matmul(&self.values.transpose(1, 2)?)?.flatten_all()?.to_vec1::<f32>()?;
        let each = of_scores.chunks_exact_mut(n).zip(self.compressed.chunks_exact(n)).zip(&self.near).zip(by_query.chunks_exact(d));
        for (at, (((g, p), near), of_output)) in each.enumerate() {
            let (head, i) = (at / rows.len(), rows[at % rows.len()]);
            let far = exact.compressed(i);
            let value = |j: usize| &exact.values[(j * kv_heads + head / share) * d..][..d];
            // Of a softmax: p (g - sum of p g), the sum over everything that is seen.
            let mut mean: f64 = tokens(&far, i).zip(near).map(|(j, &p)| f64::from(p) * f64::from(dot(of_output, value(j)))).sum();
            mean += g[far.clone()].iter().zip(&p[far.clone()]).map(|(&g, &p)| f64::from(g) * f64::from(p)).sum::<f64>();
            let mean = mean as f32;
            // Elsewhere p is zero, and so is the gradient.
            g.iter_mut().zip(p).for_each(|(g, &p)| *g = p * (*g - mean) * scale);
        }
        let back = |x: Tensor| x.transpose(0, 1)?.flatten_from(1);
        let scores = Tensor::from_vec(of_scores, (kv_heads, of_head, n), &Device::Cpu)?;
        let probabilities = Tensor::from_vec(self.compressed, (kv_heads, of_head, n), &Device::Cpu)?;
        Ok([back(scores.transpose(1, 2)?.matmul(&self.queries)?)?, back(probabilities.transpose(1, 2)?.matmul(&of_output)?)?])
    }
}

/// The tokens that the query of row `i` sees exactly.
fn tokens(far: &std::ops::Range<usize>, i: usize) -> impl Iterator<Item = usize> + use<> {
    // A query among the sinks sees those up to itself.
    (0..far.start.min(i + 1)).chain(far.end..i + 1)
}
