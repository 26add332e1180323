// The decoder of a small tokenizer in plain JavaScript: latents (l, d) to pixels, as the library's own computes them.
(function () {
  "use strict";

  // Packed float16 numbers (base64, little-endian) to float32 arrays by name.
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const found = {};
    let start = 0;
    for (const [name, shape] of Object.entries(packed.shapes)) {
      const count = shape.reduce((a, b) => a * b, 1);
      const numbers = new Float32Array(count);
      for (let i = 0; i < count; i += 1) numbers[i] = half(view.getUint16(2 * (start + i), true));
      start += count;
      found[name] = numbers;
    }
    return found;
  }

  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return (sign * fraction) / 2 ** 24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  // x (n, inputs) times weight (outputs, inputs) transposed, plus bias (outputs): (n, outputs).
  function linear(x, n, weight, bias) {
    const outputs = bias.length;
    const inputs = weight.length / outputs;
    const y = new Float32Array(n * outputs);
    for (let i = 0; i < n; i += 1) {
      for (let o = 0; o < outputs; o += 1) {
        let sum = bias[o];
        for (let k = 0; k < inputs; k += 1) sum += x[i * inputs + k] * weight[o * inputs + k];
        y[i * outputs + o] = sum;
      }
    }
    return y;
  }

  function layerNorm(x, n, weight, bias, epsilon) {
    const width = weight.length;
    const y = new Float32Array(n * width);
    for (let i = 0; i < n; i += 1) {
      let mean = 0;
      let square = 0;
      for (let k = 0; k < width; k += 1) mean += x[i * width + k] / width;
      for (let k = 0; k < width; k += 1) square += (x[i * width + k] - mean) ** 2 / width;
      const scale = 1 / Math.sqrt(square + epsilon);
      for (let k = 0; k < width; k += 1) y[i * width + k] = (x[i * width + k] - mean) * scale * weight[k] + bias[k];
    }
    return y;
  }

  // The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26).
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
    const value = 1 - series * Math.exp(-x * x);
    return x < 0 ? -value : value;
  }

  function attention(x, n, qkv, heads) {
    const width = x.length / n;
    const channels = width / heads;
    const out = new Float32Array(n * width);
    const weights = new Float32Array(n);
    for (let h = 0; h < heads; h += 1) {
      const [q, k, v] = [0, 1, 2].map((part) => part * width + h * channels);
      for (let i = 0; i < n; i += 1) {
        let most = -Infinity;
        for (let j = 0; j < n; j += 1) {
          let dot = 0;
          for (let c = 0; c < channels; c += 1) dot += qkv[i * 3 * width + q + c] * qkv[j * 3 * width + k + c];
          weights[j] = dot / Math.sqrt(channels);
          most = Math.max(most, weights[j]);
        }
        let sum = 0;
        for (let j = 0; j < n; j += 1) sum += weights[j] = Math.exp(weights[j] - most);
        for (let j = 0; j < n; j += 1) {
          for (let c = 0; c < channels; c += 1) {
            out[i * width + h * channels + c] += (weights[j] / sum) * qkv[j * 3 * width + v + c];
          }
        }
      }
    }
    return out;
  }

  // Returns decode(z (l d)) -> RGBA pixels; and decode.raw, which gives values in about [-1, 1], (3, height, width).
  window.softvqExplore.decoder = (data) => {
    const w = unpack(data.weights);
    const { size, patch, heads, depth, tokens, epsilon } = data;
    const across = size / patch;
    const n = across * across;
    const width = w["decoder.mask_token"].length;
    const total = 1 + n + tokens; // class token, masks, latents

    const raw = (z) => {
      const latents = linear(z, tokens, w["from_latent.weight"], w["from_latent.bias"]);
      let x = new Float32Array(total * width);
      for (let i = 0; i < total; i += 1) {
        for (let k = 0; k < width; k += 1) {
          const own = i === 0 ? w["decoder.vit.cls_token"][k] : w["decoder.mask_token"][k];
          x[i * width + k] =
            i <= n
              ? own + w["decoder.vit.pos_embed"][i * width + k]
              : latents[(i - n - 1) * width + k] + w["decoder.latent_pos_embed"][(i - n - 1) * width + k];
        }
      }
      for (let b = 0; b < depth; b += 1) {
        const of = (name) => w[`decoder.vit.blocks.${b}.${name}`];
        const apply = (y, layer) => linear(y, total, of(`${layer}.weight`), of(`${layer}.bias`));
        const norm = (layer) => layerNorm(x, total, of(`${layer}.weight`), of(`${layer}.bias`), epsilon);
        const scaled = (y, name) => (of(name) ? y.map((value, i) => of(name)[i % width] * value) : y); // LayerScale
        const seen = norm("norm1");
        const attended = scaled(apply(attention(seen, total, apply(seen, "attn.qkv"), heads), "attn.proj"), "ls1.gamma");
        x = x.map((value, i) => value + attended[i]);
        const hidden = apply(norm("norm2"), "mlp.fc1").map((value) => (value / 2) * (1 + erf(value / Math.SQRT2)));
        const mixed = scaled(apply(hidden, "mlp.fc2"), "ls2.gamma");
        x = x.map((value, i) => value + mixed[i]);
      }
      x = layerNorm(x, total, w["decoder.vit.norm.weight"], w["decoder.vit.norm.bias"], epsilon);
      const pixels = linear(x.subarray(width, (1 + n) * width), n, w["decoder.to_pixels.weight"], w["decoder.to_pixels.bias"]);
      const image = new Float32Array(3 * size * size);
      for (let i = 0; i < n; i += 1) {
        for (let p = 0; p < patch; p += 1) {
          for (let q = 0; q < patch; q += 1) {
            const [row, column] = [Math.floor(i / across) * patch + p, (i % across) * patch + q];
            for (let c = 0; c < 3; c += 1) image[(c * size + row) * size + column] = pixels[i * 3 * patch * patch + (p * patch + q) * 3 + c];
          }
        }
      }
      return image;
    };

    const decode = (z) => {
      const image = raw(z);
      const pixels = new Uint8ClampedArray(4 * size * size);
      for (let i = 0; i < size * size; i += 1) {
        // As the library makes bytes: truncated after a shift by half a level.
        for (let c = 0; c < 3; c += 1) pixels[4 * i + c] = Math.min(255, Math.max(0, Math.floor(127.5 * image[c * size * size + i] + 128)));
        pixels[4 * i + 3] = 255;
      }
      return pixels;
    };
    decode.raw = raw;
    return decode;
  };
  window.softvqExplore.unpack = unpack;
})();
