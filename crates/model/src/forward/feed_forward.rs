//! Feed-forward networks and mixtures of experts.

use mlx_quant_engine::{Activation, LAST, REST, Result, Selection, Tensor};

use super::pass::{Pass, scaled};
use super::watcher::{Given, Reading};
use crate::decoder::{Experts, Gate, Linear, Mlp, Moe, Router, RouterNorm, Scores};

/// Which experts a token goes to.
struct Routing {
    /// `[tokens, top_k]`, by score.
    chosen: Vec<Vec<u32>>,
    /// `[tokens, top_k]`, float32.
    weights: Tensor,
}

/// max(x - mean(x) - cutoff * deviation(x), 0), mean and standard deviation over features.
fn above(x: &Tensor, cutoff: f64) -> Result<Tensor> {
    let around = x.broadcast_sub(&x.mean_keepdim(LAST)?)?;
    let deviation = around.sqr()?.mean_keepdim(LAST)?.sqrt()?;
    around.broadcast_sub(&(deviation * cutoff)?)?.clamp(0.0, f32::INFINITY)
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
            Gate::Separate { .. } => self.glu(mlp, &projected[0], &projected[1]),
            Gate::Fused(_) => {
                let half = projected[0].dim(LAST)? / 2;
                let part = |start| projected[0].narrow(LAST, start, half);
                self.glu(mlp, &part(0)?, &part(half)?)
            }
            Gate::None(_) => self.engine.activate(&projected[0], mlp.activation),
            Gate::Xielu { parameters, .. } => self.xielu(&projected[0], parameters),
        }
    }

    /// activation(gate) * up, both within the limit if there is one
    fn glu(&self, mlp: &Mlp, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        if let Some(cutoff) = mlp.cutoff {
            return self.engine.glu(&above(gate, cutoff)?, up, mlp.activation);
        }
        let Some(limit) = mlp.limit else { return self.engine.glu(gate, up, mlp.activation) };
        let gate = self.engine.activate(gate, mlp.activation)?.clamp(f32::NEG_INFINITY, limit)?;
        gate * up.clamp(-limit, limit)?
    }

    /// ap relu(x)^2 + an (exp(min(x, 0)) - 1 - min(x, 0)) + b x. What eps takes from the second term is its rounding.
    fn xielu(&self, x: &Tensor, parameters: &str) -> Result<Tensor> {
        let scalar = |name: &str| {
            let tensor = self.parameters.tensor(&format!("{parameters}.{name}"))?;
            tensor.read(|values| f64::from(values.first().copied().unwrap_or_default()))
        };
        let softplus = |x: f64| x.exp().ln_1p();
        let beta = scalar("beta")?;
        let (positive, negative) = (softplus(scalar("alpha_p")?), beta + softplus(scalar("alpha_n")?));
        let below = x.clamp(f32::NEG_INFINITY, 0.0)?;
        let curve = (below.exp()?.affine(negative, -negative)? - below.affine(negative, 0.0)?)?;
        let above = self.engine.activate(x, Activation::ReluSquared)?.affine(positive, 0.0)?;
        (above + curve)? + x.affine(beta, 0.0)?
    }

    /// sum over the chosen of weight * expert(x), + shared expert; x is a norm of the residual stream
    pub(super) async fn moe(&mut self, moe: &Moe, stream: &Tensor, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, hidden) = x.dims3()?;
        let flat = x.reshape((batch * tokens, hidden))?; // [n, hidden]
        let seen = match &moe.router.norm {
            None => flat.clone(),
            Some(norm) => self.router_norm(norm, stream)?.reshape((batch * tokens, hidden))?,
        };
        let gate = moe.shared.as_ref().and_then(|shared| shared.gate.as_ref());
        let down = moe.latent.as_ref().map(|latent| &latent.down);
        let readers: Vec<_> = std::iter::once(&moe.router.linear).chain(gate).chain(down).collect();
        let mut read = self.read(&readers, &seen).await?;
        let routing = self.route(&moe.router, &read.remove(0))?;
        let mut output = match &moe.latent {
            None => self.experts(moe, &routing, &flat).await?,
            Some(latent) => {
                let inner = read.pop().ok_or_else(|| mlx_quant_engine::Error::msg("no latent vector"))?;
                let inner = self.experts(moe, &routing, &inner).await?;
                self.read(&[&latent.up], &inner).await?.remove(0)
            }
        };
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

    /// x / sqrt(mean(x^2) + eps) * scale * multiplier
    fn router_norm(&self, norm: &RouterNorm, x: &Tensor) -> Result<Tensor> {
        let scale = scaled(self.parameters.tensor(&norm.scale)?.clone(), norm.multiplier)?;
        self.engine.rms_norm(x, Some(&scale), norm.epsilon)
    }

    fn route(&self, router: &Router, logits: &Tensor) -> Result<Routing> {
        let scores = match router.scores {
            Scores::Softmax => self.engine.softmax(logits)?,
            Scores::Sigmoid => self.engine.activate(logits, Activation::Sigmoid)?,
            Scores::RootOfSoftplus => self.engine.activate(logits, Activation::Softplus)?.sqrt()?,
            Scores::SoftmaxOfChosen | Scores::Sparsemixer { .. } => logits.clone(),
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
        let of_chosen = |scores: &Tensor| {
            scores.reshape((tokens * experts, 1))?.rows(&places)?.reshape((tokens, router.top_k))
        };
        let mut weights = match router.scores {
            Scores::SoftmaxOfChosen => self.engine.softmax(&of_chosen(&scores)?)?,
            Scores::Sparsemixer { jitter } => self.sparsemixer(&scores, &chosen, jitter)?,
            _ => of_chosen(&scores)?,
        };
        if let Some(epsilon) = router.renormalize {
            weights = weights.broadcast_div(&(weights.sum_keepdim(1)? + epsilon)?)?;
        }
        weights = scaled(weights, router.multiplier)?;
        if let Some(scale) = &router.expert_scale {
            let scale = self.parameters.tensor(scale)?.reshape((experts, 1))?;
            weights = (weights * scale.rows(&chosen.concat())?.reshape((tokens, router.top_k))?)?;
        }
        Ok(Routing { chosen, weights })
    }

    /// Of each chosen expert, by score, its part of a softmax over those near it: `[n, top_k]`.
    fn sparsemixer(&self, logits: &Tensor, chosen: &[Vec<u32>], jitter: f64) -> Result<Tensor> {
        let (tokens, experts) = logits.dims2()?;
        let slots = chosen.first().map_or(0, Vec::len);
        // 0 for experts that take part, by slot.
        let masks = logits.read(|logits| {
            let mask = |slot: usize| {
                let row = |(row, chosen): (&[f32], &Vec<u32>)| {
                    let best = row[chosen[slot] as usize];
                    let near = |at: usize| (best - row[at]) / row[at].abs().max(best) <= 2.0 * jitter as f32;
                    let earlier = |at: usize| chosen[..slot].contains(&(at as u32));
                    let out = |at: usize| if near(at) && !earlier(at) { 0.0 } else { f32::NEG_INFINITY };
                    (0..experts).map(out).collect::<Vec<f32>>()
                };
                logits.chunks_exact(experts.max(1)).zip(chosen).flat_map(row).collect::<Vec<f32>>()
            };
            (0..slots).map(mask).collect::<Vec<_>>()
        })?;
        let weight = |(slot, mask): (usize, Vec<f32>)| {
            let mask = Tensor::from_vec(mask, (tokens, experts), logits.device())?;
            let scores = self.engine.softmax(&(logits + mask)?)?.reshape((tokens * experts, 1))?;
            let place = |(token, chosen): (usize, &Vec<u32>)| (token * experts) as u32 + chosen[slot];
            scores.rows(&chosen.iter().enumerate().map(place).collect::<Vec<u32>>())
        };
        let weights = masks.into_iter().enumerate().map(weight).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&weights, 1)
    }

    /// Tokens sorted by expert, each expert on its own, back in order of tokens, weighted sum.
    async fn experts(&mut self, moe: &Moe, routing: &Routing, x: &Tensor) -> Result<Tensor> {
        let experts: &Experts = &moe.experts;
        let top_k = routing.weights.dim(1)?;
        let mut by_expert: Vec<Vec<u32>> = vec![Vec::new(); experts.count()];
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
        let mut sorted = x.rows(&rows)?; // [n * k, hidden]
        if moe.router.before {
            sorted = sorted.broadcast_mul(&routing.weights.reshape((order.len(), 1))?.rows(&order)?)?;
        }
        let (mut outputs, mut start) = (Vec::new(), 0);
        let together = self.watcher.experts(self.engine.experts_at_once());
        for (group, pairs) in by_expert.chunks(together).enumerate() {
            let some = pairs.iter().enumerate().filter(|(_, pairs)| !pairs.is_empty());
            let some: Vec<_> = some.map(|(at, pairs)| (group * together + at, pairs.len())).collect();
            let tokens = some.iter().map(|(_, tokens)| tokens).sum();
            if tokens > 0 {
                let routed =
                    (!moe.router.before && moe.latent.is_none()).then(|| &rows[start..start + tokens]);
                let x = sorted.narrow(0, start, tokens)?;
                outputs.push(self.of_experts(experts, &some, (&x, routed)).await?);
                start += tokens;
            }
        }
        let outputs = Tensor::cat(&outputs, 0)?.rows(&position)?; // [n * k, hidden]
        let outputs = outputs.reshape((x.dim(0)?, top_k, REST))?;
        if moe.router.before {
            return outputs.sum(1);
        }
        outputs.broadcast_mul(&routing.weights.unsqueeze(2)?)?.sum(1)
    }

    /// activation(gate(x)) * up(x) of an expert: what its last linear reads
    pub(super) fn inner(&self, mlp: &Mlp, slice: Option<usize>, x: &Tensor) -> Result<Tensor> {
        let projected = self.read_expert(&mlp.gate.linears(), slice, x, None)?;
        self.product(mlp, &projected)
    }

    /// What some experts make of their tokens, which lie behind each other in `x`; `tokens` are their numbers.
    async fn of_experts(
        &mut self,
        experts: &Experts,
        some: &[(usize, usize)],
        (x, tokens): (&Tensor, Option<&[u32]>),
    ) -> Result<Tensor> {
        let mlp = |(expert, _): &(usize, usize)| experts.of(*expert).0;
        let enter: Vec<_> = some.iter().map(|own| (mlp(own).gate.linears(), *own)).collect();
        let projected = self.read_experts(experts, &enter, (x, tokens)).await?;
        // Xielu has numbers of its own in each expert.
        let product = if some.len() == 1 || !matches!(mlp(&some[0]).gate, Gate::Xielu { .. }) {
            self.product(mlp(&some[0]), &projected)?
        } else {
            let mut first = 0;
            let mut parts = Vec::new();
            for own in some {
                let part = |all: &Tensor| all.narrow(0, first, own.1);
                let projected = projected.iter().map(part).collect::<Result<Vec<_>>>()?;
                parts.push(self.product(mlp(own), &projected)?);
                first += own.1;
            }
            Tensor::cat(&parts, 0)?
        };
        drop(projected);
        let leave: Vec<_> = some.iter().map(|own| (vec![&mlp(own).down], *own)).collect();
        Ok(self.read_experts(experts, &leave, (&product, tokens)).await?.remove(0))
    }

    /// x @ weight^T + bias of linears of several experts, each of its own tokens of `x`: of each linear what all give.
    async fn read_experts(
        &mut self,
        experts: &Experts,
        some: &[(Vec<&Linear>, (usize, usize))],
        (x, numbers): (&Tensor, Option<&[u32]>),
    ) -> Result<Vec<Tensor>> {
        let (mut inputs, mut routed, mut first) = (Vec::new(), Vec::new(), 0);
        for (_, (_, tokens)) in some {
            inputs.push(x.narrow(0, first, *tokens)?);
            routed.push(numbers.map(|numbers| &numbers[first..first + tokens]));
            first += tokens;
        }
        let readings: Vec<Reading<'_>> = some
            .iter()
            .zip(inputs.iter().zip(&routed))
            .map(|((readers, (expert, _)), (input, tokens))| Reading {
                readers: readers.clone(),
                expert: Some(*expert),
                input,
                tokens: *tokens,
            })
            .collect();
        let given = self.watcher.see(&readings).await?;
        if let Some(weights) = self.plain_weights(experts, &readings, &given)? {
            let rows: Vec<usize> = some.iter().map(|(_, (_, tokens))| *tokens).collect();
            return weights.iter().map(|weights| self.engine.linears(x, &rows, weights)).collect();
        }
        let mut all: Vec<Vec<Tensor>> = vec![Vec::new(); some[0].0.len()];
        for (((readers, (expert, _)), input), given) in some.iter().zip(&inputs).zip(given) {
            let read = self.read_expert(readers, experts.of(*expert).1, input, given)?;
            all.iter_mut().zip(read).for_each(|(all, output)| all.push(output));
        }
        let joined = |mut parts: Vec<Tensor>| match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => Tensor::cat(&parts, 0),
        };
        all.into_iter().map(joined).collect()
    }

    /// Weights of several experts' first linears, then of their second ones, and so on; `None` where there is one expert, or
    /// a linear is more than its weight: has a bias, or is read by something else.
    fn plain_weights(
        &self,
        experts: &Experts,
        readings: &[Reading<'_>],
        given: &[Given],
    ) -> Result<Option<Vec<Vec<Tensor>>>> {
        let more = |linear: &&Linear| {
            let bias = self.parameters.get(&format!("{}.bias", linear.path));
            bias.is_some() || self.parameters.reader(&linear.path).is_some()
        };
        if readings.len() < 2 || readings.iter().any(|own| own.readers.iter().any(more)) {
            return Ok(None);
        }
        let weight = |at: usize, (own, given): (&Reading<'_>, &Given)| {
            if let Some(weights) = given {
                return Ok(weights[at].clone());
            }
            let whole = self.parameters.tensor(&format!("{}.weight", own.readers[at].path))?;
            let slice = own.expert.and_then(|expert| experts.of(expert).1);
            slice.map_or_else(|| Ok(whole.clone()), |slice| whole.get(slice))
        };
        let of =
            |at: usize| readings.iter().zip(given).map(|own| weight(at, own)).collect::<Result<Vec<_>>>();
        (0..readings[0].readers.len()).map(of).collect::<Result<Vec<_>>>().map(Some)
    }

    /// x @ weight^T + bias of each linear, of its slice where experts are stacked; with other weights than the block's if
    /// some are given.
    fn read_expert(
        &self,
        linears: &[&Linear],
        slice: Option<usize>,
        x: &Tensor,
        given: Given,
    ) -> Result<Vec<Tensor>> {
        let own = |tensor: &Tensor| match slice {
            Some(slice) => tensor.get(slice),
            None => Ok(tensor.clone()),
        };
        let multiply = |(at, linear): (usize, &&Linear)| {
            let bias = self.parameters.get(&format!("{}.bias", linear.path));
            let bias = bias.map(own).transpose()?;
            if let Some(weights) = &given {
                return self.engine.linear(x, &weights[at], bias.as_ref());
            }
            if let Some(reader) = self.parameters.reader(&linear.path) {
                return reader.read(x, slice, bias.as_ref());
            }
            let weight = own(self.parameters.tensor(&format!("{}.weight", linear.path))?)?;
            self.engine.linear(x, &weight, bias.as_ref())
        };
        linears.iter().enumerate().map(multiply).collect()
    }
}
