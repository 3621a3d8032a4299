// A layer of round points, each one vertex: ScatterplotLayer draws instances of a square, which takes a software WebGL
// some twenty microseconds apiece.
import { Layer, project32 } from "@deck.gl/core";
import { Model } from "@luma.gl/engine";

const block = `layout(std140) uniform pointsUniforms { float radius; } points;`;
const points = { name: "points", vs: block, uniformTypes: { radius: "f32" } };

const vs = `#version 300 es
#define SHADER_NAME point-layer-vertex
in vec2 positions;
in vec4 colors;
out vec4 vColor;
out float vSize;
void main(void) {
  gl_Position = project_position_to_clipspace(vec3(positions, 0.0), vec3(0.0), vec3(0.0));
  vSize = 2.0 * points.radius * project.devicePixelRatio + 1.0;
  gl_PointSize = vSize;
  vColor = colors;
}`;

const fs = `#version 300 es
#define SHADER_NAME point-layer-fragment
precision highp float;
in vec4 vColor;
in float vSize;
out vec4 fragColor;
void main(void) {
  float inside = clamp((0.5 - length(gl_PointCoord - 0.5)) * vSize, 0.0, 1.0);
  fragColor = vec4(vColor.rgb, vColor.a * inside);
}`;

export class PointLayer extends Layer {
  static layerName = "PointLayer";
  // places: Float32Array [2 n]; colors: Uint8Array [4 n]; radius: in data units, at least and at most so many pixels
  static defaultProps = { places: null, colors: null, radius: 1, radiusMinPixels: 1, radiusMaxPixels: 5 };

  getNumInstances() {
    return 0;
  }

  initializeState() {
    const model = new Model(this.context.device, {
      ...this.getShaders({ vs, fs, modules: [project32, points] }),
      id: this.props.id,
      topology: "point-list",
      bufferLayout: [{ name: "positions", format: "float32x2" }, { name: "colors", format: "unorm8x4" }],
      isInstanced: false,
    });
    this.setState({ model });
  }

  updateState({ props, oldProps }) {
    for (const [name, attribute] of [["places", "positions"], ["colors", "colors"]])
      if (props[name] !== oldProps[name]) {
        this.state[name]?.destroy();
        this.state[name] = this.context.device.createBuffer({ data: props[name] });
        this.state.model.setAttributes({ [attribute]: this.state[name] });
      }
    this.state.model.setVertexCount(props.places.length / 2);
    this.setNeedsRedraw();
  }

  finalizeState(context) {
    super.finalizeState(context);
    this.state.places?.destroy();
    this.state.colors?.destroy();
  }

  draw() {
    const { radius, radiusMinPixels, radiusMaxPixels } = this.props;
    const pixels = Math.min(radiusMaxPixels, Math.max(radiusMinPixels, radius * 2 ** this.context.viewport.zoom));
    this.state.model.shaderInputs.setProps({ points: { radius: pixels } });
    this.state.model.draw(this.context.renderPass);
  }
}
