//! Feed-forward networks and mixtures of experts.

use mlx_quant_engine::{Activation, LAST, REST, Result, Selection, Tensor};

use super::pass::{Pass, scaled};
use crate::decoder::{Experts, Gate, Linear, Mlp, Moe, Router, Scores};

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
            Gate::Separate { .. } => self.engine.glu(&projected[0], &projected[1], mlp.activation),
            Gate::Fused(_) => {
                let half = projected[0].dim(LAST)? / 2;
                let part = |start| projected[0].narrow(LAST, start, half);
                self.engine.glu(&part(0)?, &part(half)?, mlp.activation)
            }
            Gate::None(_) => self.engine.activate(&projected[0], mlp.activation),
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
                let gate = self.engine.activate(&read.remove(0), Activation::Sigmoid)?; // [n, 1]
                own = own.broadcast_mul(&gate)?;
            }
            output = self.engine.add(&output, &own, 1.0)?;
        }
        output.reshape((batch, tokens, hidden))
    }

    fn route(&self, router: &Router, logits: &Tensor) -> Result<Routing> {
        let scores = match router.scores {
            Scores::Softmax => self.engine.softmax(logits)?,
            Scores::Sigmoid => self.engine.activate(logits, Activation::Sigmoid)?,
            Scores::SoftmaxOfChosen => logits.clone(),
        }; // [n, experts]
        let judged = match &router.correction {
            None => scores.clone(),
            Some(name) => scores.broadcast_add(self.parameters.tensor(name)?)?,
        };
        let selection = Selection { top_k: router.top_k, groups: router.groups };
        let chosen = self.engine.route(&judged, &selection)?;
        let (tokens, experts) = scores.dims2()?;
        let place = |(token, chosen): (usize, &Vec<u32>)| {
            let first = (token * experts) as u32;
            chosen.iter().map(|expert| first + expert).collect::<Vec<_>>()
        };
        let places: Vec<u32> = chosen.iter().enumerate().flat_map(place).collect();
        let mut weights = scores.reshape((tokens * experts, 1))?.rows(&places)?;
        weights = weights.reshape((tokens, router.top_k))?;
        if router.scores == Scores::SoftmaxOfChosen {
            weights = self.engine.softmax(&weights)?;
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
        let rows: Vec<u32> = order.iter().map(|pair| pair / top_k as u32).collect();
        let sorted = x.rows(&rows)?; // [n * k, hidden]
        let (mut outputs, mut start) = (Vec::new(), 0);
        for (expert, pairs) in by_expert.iter().enumerate().filter(|(_, pairs)| !pairs.is_empty()) {
            let x = sorted.narrow(0, start, pairs.len())?;
            outputs.push(self.expert(&experts.mlp, expert, &x).await?);
            start += pairs.len();
        }
        let outputs = Tensor::cat(&outputs, 0)?.rows(&position)?; // [n * k, hidden]
        let outputs = outputs.reshape((x.dim(0)?, top_k, REST))?;
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
                return self.engine.linear(x, &weights[at], bias.as_ref());
            }
            if let Some(reader) = self.parameters.reader(&linear.path) {
                return reader.read(x, Some(expert), bias.as_ref());
            }
            let weight = self.parameters.tensor(&format!("{}.weight", linear.path))?.get(expert)?;
            self.engine.linear(x, &weight, bias.as_ref())
        };
        linears.iter().enumerate().map(multiply).collect()
    }
}
