//! Feed-forward networks and mixtures of experts.

use candle_core::{D, Result, Tensor};

use super::{Pass, scaled};
use crate::decoder::{Experts, Gate, Linear, Mlp, Moe, Router, Scores};
use crate::ops::Activation;

/// Which experts a token goes to.
struct Routing {
    /// `[tokens, top_k]`, by score.
    chosen: Vec<Vec<u32>>,
    /// `[tokens, top_k]`, float32.
    weights: Tensor,
}

impl Pass<'_> {
    /// down(activation(gate(x)) * up(x))
    pub(super) async fn mlp(&mut self, mlp: &Mlp, x: &Tensor) -> Result<Tensor> {
        let projected = self.read(&mlp.gate.linears(), x).await?;
        let product = self.product(mlp, &projected)?;
        drop(projected);
        Ok(self.read(&[&mlp.down], &product).await?.remove(0))
    }

    fn product(&self, mlp: &Mlp, projected: &[Tensor]) -> Result<Tensor> {
        match &mlp.gate {
            Gate::Separate { .. } => self.kernels.glu(&projected[0], &projected[1], mlp.activation),
            Gate::Fused(_) => {
                let half = projected[0].dim(D::Minus1)? / 2;
                let part = |start| projected[0].narrow(D::Minus1, start, half);
                self.kernels.glu(&part(0)?, &part(half)?, mlp.activation)
            }
            Gate::None(_) => self.kernels.activate(&projected[0], mlp.activation),
        }
    }

    /// sum over the chosen of weight * expert(x), + shared expert
    pub(super) async fn moe(&mut self, moe: &Moe, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, hidden) = x.dims3()?;
        let flat = x.reshape((batch * tokens, hidden))?; // [n, hidden]
        let gate = moe.shared.as_ref().and_then(|shared| shared.gate.as_ref());
        let readers: Vec<_> = std::iter::once(&moe.router.linear).chain(gate).collect();
        let mut read = self.read(&readers, &flat).await?;
        let routing = self.route(&moe.router, &read.remove(0))?;
        let mut output = self.experts(&moe.experts, &routing, &flat).await?;
        if let Some(shared) = &moe.shared {
            let mut own = self.mlp(&shared.mlp, &flat).await?;
            if !read.is_empty() {
                let gate = self.kernels.activate(&read.remove(0), Activation::Sigmoid)?; // [n, 1]
                own = own.broadcast_mul(&gate)?;
            }
            output = self.kernels.add(&output, &own, 1.0)?;
        }
        output.reshape((batch, tokens, hidden))
    }

    fn route(&self, router: &Router, logits: &Tensor) -> Result<Routing> {
        let scores = match router.scores {
            Scores::Softmax => self.kernels.softmax(logits)?,
            Scores::Sigmoid => self.kernels.activate(logits, Activation::Sigmoid)?,
            Scores::SoftmaxOfChosen => logits.clone(),
        }; // [n, experts]
        let judged = match &router.correction {
            None => scores.clone(),
            Some(name) => scores.broadcast_add(self.parameters.tensor(name)?)?,
        };
        let chosen: Vec<Vec<u32>> =
            judged.detach().to_vec2::<f32>()?.iter().map(|row| router.choose(row)).collect();
        let shape = (chosen.len(), router.top_k);
        let index = Tensor::from_vec(chosen.concat(), shape, logits.device())?;
        let mut weights = scores.gather(&index, 1)?; // [n, k]
        if router.scores == Scores::SoftmaxOfChosen {
            weights = self.kernels.softmax(&weights)?;
        }
        if let Some(epsilon) = router.renormalize {
            weights = weights.broadcast_div(&(weights.sum_keepdim(1)? + epsilon)?)?;
        }
        Ok(Routing { chosen, weights: scaled(weights, router.multiplier)? })
    }

    /// Tokens sorted by expert, each expert on its own, back in order of tokens, weighted sum.
    async fn experts(&mut self, experts: &Experts, routing: &Routing, x: &Tensor) -> Result<Tensor> {
        let top_k = routing.weights.dim(1)?;
        let mut by_expert: Vec<Vec<u32>> = vec![Vec::new(); experts.count];
        for (token, chosen) in routing.chosen.iter().enumerate() {
            for (slot, &expert) in chosen.iter().enumerate() {
                by_expert[expert as usize].push((token * top_k + slot) as u32);
            }
        }
        let order: Vec<u32> = by_expert.concat(); // pairs (token, slot), sorted by expert
        let mut position = vec![0u32; order.len()];
        for (at, &pair) in order.iter().enumerate() {
            position[pair as usize] = at as u32;
        }
        let vector = |values: Vec<u32>| {
            let length = values.len();
            Tensor::from_vec(values, length, x.device())
        };
        let rows = vector(order.iter().map(|pair| pair / top_k as u32).collect())?;
        let sorted = x.index_select(&rows, 0)?; // [n * k, hidden]
        let (mut outputs, mut start) = (Vec::new(), 0);
        for (expert, pairs) in by_expert.iter().enumerate().filter(|(_, pairs)| !pairs.is_empty()) {
            let x = sorted.narrow(0, start, pairs.len())?;
            outputs.push(self.expert(&experts.mlp, expert, &x).await?);
            start += pairs.len();
        }
        let outputs = Tensor::cat(&outputs, 0)?.index_select(&vector(position)?, 0)?; // [n * k, hidden]
        let outputs = outputs.reshape((x.dim(0)?, top_k, ()))?;
        outputs.broadcast_mul(&routing.weights.unsqueeze(2)?)?.sum(1)
    }

    async fn expert(&mut self, mlp: &Mlp, expert: usize, x: &Tensor) -> Result<Tensor> {
        let projected = self.read_stacked(&mlp.gate.linears(), expert, x).await?;
        let product = self.product(mlp, &projected)?;
        drop(projected);
        Ok(self.read_stacked(&[&mlp.down], expert, &product).await?.remove(0))
    }

    /// x @ weight[expert]^T + bias[expert] of each linear
    async fn read_stacked(&mut self, linears: &[&Linear], expert: usize, x: &Tensor) -> Result<Vec<Tensor>> {
        let weights = self.watcher.see(linears, Some(expert), x).await?;
        let multiply = |(at, linear): (usize, &&Linear)| {
            let bias = self.parameters.get(&format!("{}.bias", linear.path));
            let bias = bias.map(|bias| bias.get(expert)).transpose()?;
            if let Some(weights) = &weights {
                return self.kernels.linear(x, &weights[at], bias.as_ref());
            }
            if let Some(reader) = self.parameters.reader(&linear.path) {
                return reader.read(self.kernels, x, Some(expert), bias.as_ref());
            }
            let weight = self.parameters.tensor(&format!("{}.weight", linear.path))?.get(expert)?;
            self.kernels.linear(x, &weight, bias.as_ref())
        };
        linears.iter().enumerate().map(multiply).collect()
    }
}

impl Router {
    /// The `top_k` best of a token's scores, best first; of equals the first.
    fn choose(&self, scores: &[f32]) -> Vec<u32> {
        let mut allowed = vec![true; scores.len()];
        if let Some(groups) = &self.groups {
            let size = scores.len() / groups.count.max(1);
            let judged: Vec<f32> = scores
                .chunks_exact(size.max(1))
                .map(|group| {
                    let best = best(group, if groups.best_two { 2 } else { 1 });
                    best.iter().map(|&index| group[index as usize]).sum()
                })
                .collect();
            let kept = best(&judged, groups.keep);
            for (index, allowed) in allowed.iter_mut().enumerate() {
                *allowed = kept.contains(&((index / size.max(1)) as u32));
            }
        }
        let masked: Vec<f32> = scores
            .iter()
            .zip(allowed)
            .map(|(&score, allowed)| if allowed { score } else { f32::NEG_INFINITY })
            .collect();
        best(&masked, self.top_k)
    }
}

/// Indices of the `count` largest, largest first; of equals the first.
fn best(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    order.truncate(count);
    order
}
